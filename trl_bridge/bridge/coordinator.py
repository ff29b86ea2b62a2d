"""The coordinator `w`: small matrices A and B beside the student."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from ..training.backends import Weights
from .projection import CoordinatorGradient
from .targets import Projection, Target


class Coordinator:
    """
    A and B of every target layer, and the calls that tie them to the student: `pull` takes their gradients at the end of
    an update, `push` and `settle` bring what they have become into the student and the shadow.

    Args:
        targets (`list[Target]`):
            The layers.
        peft_config ([`~peft.PeftConfig`]):
            Their shape, with the targets that PEFT resolved.
    """

    def __init__(self, targets: list[Target], peft_config: PeftConfig):
        self.targets = targets
        self.peft_config = peft_config

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each target in turn."""
        for target in self.targets:
            yield target.a
            yield target.b

    def gradient_of(self, weights: Weights) -> CoordinatorGradient:
        """A and B's part of the gradients of the student's or the shadow's weights, for `pull`."""
        raise NotImplementedError

    def pull(self, fused: Projection, shadow: Projection | None, policy_weight: float) -> None:
        """
        Set the gradients of A and B: the projection of F - lambda G_hat, at iterate k and before any clipping.

        Args:
            fused (`list[tuple[torch.Tensor, torch.Tensor]]`):
                Projection of the student's accumulated gradient F, averaged over ranks.
            shadow (`list[tuple[torch.Tensor, torch.Tensor]]`, *optional*):
                That of the shadow's G_hat, likewise; `None` without the cooperative gain.
            policy_weight (`float`):
                lambda.
        """
        for index, target in enumerate(self.targets):
            target.a.grad, target.b.grad = fused[index]
            if shadow is not None:
                target.a.grad = target.a.grad - policy_weight * shadow[index][0]
                target.b.grad = target.b.grad - policy_weight * shadow[index][1]

    def snapshot(self) -> Projection:
        """Copies of A and B of each target."""
        return [(target.a.detach().clone(), target.b.detach().clone()) for target in self.targets]

    def push(self, old: Projection, models: Sequence[Weights]) -> None:
        """
        When A and B have stepped, before theta and the shadow do.

        Args:
            old (`list[tuple[torch.Tensor, torch.Tensor]]`):
                A and B before the coordinator's step.
            models (`Sequence[Weights]`):
                Weights of the student and of the shadow.
        """
        raise NotImplementedError

    def settle(self, models: Sequence[Weights]) -> None:
        """When theta and the shadow have stepped too. Nothing here."""

    def subtract_from(self, weights: Weights, keep: bool) -> dict[str, torch.Tensor]:
        """
        Theta, or the shadow's: weights without w's part. Collective where weights are spread over ranks.

        Args:
            weights ([`Weights`]):
                Weights of the student or of the shadow.
            keep (`bool`):
                Whether this rank wants them.

        Returns:
            `dict[str, torch.Tensor]`: new float32 tensors on the CPU, by name; empty where they are not wanted.
        """
        raise NotImplementedError

    @torch.no_grad()
    def norm(self) -> float:
        """Frobenius norm of s B A over all targets, from r x r products."""
        squares = [
            target.scaling**2 * ((target.b.T @ target.b).double() * (target.a @ target.a.T).double()).sum()
            for target in self.targets
        ]
        return torch.stack(squares).sum().clamp(min=0).sqrt().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A and B under PEFT's names, float32 on the CPU."""
        state = {}
        for target in self.targets:
            prefix = f"base_model.model.{target.module}"
            state[f"{prefix}.lora_A.weight"] = target.a.detach().float().cpu().clone()
            state[f"{prefix}.lora_B.weight"] = target.b.detach().float().cpu().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for target in self.targets:
            prefix = f"base_model.model.{target.module}"
            target.a.copy_(state[f"{prefix}.lora_A.weight"])
            target.b.copy_(state[f"{prefix}.lora_B.weight"])

    def shape(self) -> dict[str, Any]:
        """What a resumed run must share: rank and scaling by layer, as JSON values."""
        return {target.module: [target.a.size(0), target.scaling] for target in self.targets}


def default_peft_config() -> LoraConfig:
    """The paper's coordinator: rank 16, alpha 16 (scale 1). Targets and dropout are choices of ours."""
    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
