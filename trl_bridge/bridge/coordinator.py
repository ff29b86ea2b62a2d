"""
The coordinator `w` in merged form: small matrices A and B beside the plain student.

For a linear layer the student holds M = theta + s B A, and theta is never stored. By the chain rule the gradient with
respect to theta is the one with respect to M, and those of A and B are its projections s B^T G and s G A^T
(`docs/bridge.md`).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .targets import Target, check_peft_config, check_targets


_ADAPTER = "default"  # PEFT's own name for an adapter that has none
Projection = list[tuple[torch.Tensor, torch.Tensor]]


class Coordinator:
    """
    A and B of every target layer, and the two calls that tie them to the student.

    Target layers, patterns, scaling and initial values are PEFT's own: adapters are put into the model, read off, and
    taken out again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Plain model. Some initialisations (PiSSA) change its weights, as in PEFT; `merge_into` restores the sum.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The coordinator's shape. `None` takes rank 16, alpha 16, all linear layers.
        seed (`int`):
            Seed of the initial values; the global random state is left as it was.

    Raises:
        ValueError: no layer matches, or the configuration is not additive LoRA.
    """

    def __init__(self, model: PreTrainedModel, peft_config: PeftConfig | None, seed: int):
        # PEFT writes the resolved targets into the configuration; the user's own stays as it was.
        self.peft_config = default_peft_config() if peft_config is None else copy.deepcopy(peft_config)
        check_peft_config(self.peft_config)
        self.targets = _read_off_adapters(model, self.peft_config, seed)
        check_targets(model, self.targets)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each target in turn."""
        for target in self.targets:
            yield target.a
            yield target.b

    def project(self, gradients: Mapping[str, torch.Tensor]) -> Projection:
        """
        Project gradients with respect to the merged weights onto A and B.

        Args:
            gradients (`Mapping[str, torch.Tensor]`):
                For each target, by its weight's name, a gradient of the weight's shape.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: for each target, gradients of the shapes of A and B.
        """
        return [target.project(gradients[target.weight_name]) for target in self.targets]

    def pull(
        self, fused: Mapping[str, torch.Tensor], shadow: Mapping[str, torch.Tensor] | None, policy_weight: float
    ) -> None:
        """
        Set the gradients of A and B: the projection of F - lambda G_hat, at iterate k and before any clipping.

        Args:
            fused (`Mapping[str, torch.Tensor]`):
                The student's accumulated gradient F by weight name, averaged over ranks.
            shadow (`Mapping[str, torch.Tensor]`, *optional*):
                The shadow's G_hat, likewise; `None` without the cooperative gain.
            policy_weight (`float`):
                lambda.
        """
        for target in self.targets:
            gradient = fused[target.weight_name]
            if shadow is not None:
                gradient = gradient - policy_weight * shadow[target.weight_name]
            target.a.grad, target.b.grad = target.project(gradient)

    def snapshot(self) -> Projection:
        """Copies of A and B of each target."""
        return [(target.a.detach().clone(), target.b.detach().clone()) for target in self.targets]

    @torch.no_grad()
    def push(self, old: Projection, models: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """
        Add s (B'A' - BA) to merged weights.

        Args:
            old (`list[tuple[torch.Tensor, torch.Tensor]]`):
                A and B before the coordinator's step.
            models (`Sequence[Mapping[str, torch.Tensor]]`):
                Weights of the student and of the shadow, by name.
        """
        for target, (a, b) in zip(self.targets, old, strict=True):
            # Written as a sum of two small terms: the difference of the two products would cancel.
            delta = target.scaling * ((target.b - b) @ target.a + b @ (target.a - a))
            for weights in models:
                weight = weights[target.weight_name]
                weight.add_(target.oriented(delta).to(weight.dtype))

    @torch.no_grad()
    def merge_into(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Add s B A to the weights of a plain model, once, at the start."""
        for target in self.targets:
            weights[target.weight_name].add_(target.product())

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Whether s B A is zero everywhere, as with PEFT's default initial values."""
        return all(not target.product().any() for target in self.targets)

    @torch.no_grad()
    def subtract_from(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights less s B A, as new float32 tensors on the CPU, by name."""
        products = {target.weight_name: target for target in self.targets}
        return {
            name: (weight - products[name].product() if name in products else weight).float().cpu().clone()
            for name, weight in weights.items()
        }

    @torch.no_grad()
    def norm(self) -> float:
        """Frobenius norm of s B A over all targets, from r x r products."""
        squares = [
            target.scaling**2 * ((target.b.T @ target.b).double() * (target.a @ target.a.T).double()).sum()
            for target in self.targets
        ]
        return torch.stack(squares).sum().clamp(min=0).sqrt().item()

    @torch.no_grad()
    def base_norm(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Norm of theta = M - s B A, over all parameters."""
        squares = [torch.linalg.vector_norm(weight, dtype=torch.float64).square() for weight in weights.values()]
        # |M - sBA|^2 = |M|^2 - 2 <M, sBA> + |sBA|^2, with products of the adapters' size only.
        for target in self.targets:
            projected = target.b.T @ target.oriented(weights[target.weight_name]).to(target.b.dtype)
            squares.append(-2 * target.scaling * (projected.double() * target.a.double()).sum())
        total = torch.stack(squares).sum() + self.norm() ** 2
        return total.clamp(min=0).sqrt().item()

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


def _read_off_adapters(model: PreTrainedModel, peft_config: PeftConfig, seed: int) -> list[Target]:
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, peft_config, _ADAPTER)
        except ValueError as error:
            raise ValueError(f"`peft_config.target_modules` cannot be used: {error}") from error
    try:
        return _targets_of(model)
    finally:
        tuner.unload()
        # PEFT leaves its configuration behind on the model, where TRL and transformers would read it.
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def _targets_of(model: PreTrainedModel) -> list[Target]:
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        if _ADAPTER not in layer.lora_A:
            raise ValueError(
                f"`peft_config.target_modules` matches {name!r}, a {type(layer.get_base_layer()).__name__}; the "
                "coordinator acts on linear layers. Exclude it (`exclude_modules`)."
            )
    return [
        Target(
            module=name,
            a=nn.Parameter(layer.lora_A[_ADAPTER].weight.detach().float().clone()),
            b=nn.Parameter(layer.lora_B[_ADAPTER].weight.detach().float().clone()),
            scaling=float(layer.scaling[_ADAPTER]),
            transposed=isinstance(layer.get_base_layer(), Conv1D),
        )
        for name, layer in layers
    ]
