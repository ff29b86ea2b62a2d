"""
The coordinator `w` in merged form, beside the plain student.

For a linear layer, and for each of a layer's fused experts, the student holds M = theta + s B A, and theta is never stored. By the chain rule the gradient with
respect to theta is the one with respect to M, and those of A and B are its projections s B^T G and s G A^T
(`docs/bridge.md`).
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...training.backends import Weights
from .targets import ExpertsTarget, Projection, Target, check_layers, check_peft_config, check_targets


class CoordinatorGradient:
    """A and B's part of a model's accumulated gradient."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def so_far(self) -> Projection:
        """What this rank's gradients come to by now; `reduce_` makes it the full one."""
        raise NotImplementedError

    def reduce_(self, projection: Projection, synced: bool) -> None:
        """Reduce over ranks, in place."""
        self.weights.reduce_([part for pair in projection for part in pair], synced)

    def full(self) -> Projection:
        """At the end of a window: all of it, averaged over ranks."""
        projection = self.so_far()
        self.reduce_(projection, synced=True)
        return projection

    def clear(self) -> None:
        """When it has been read, or a window starts again."""
        raise NotImplementedError


class Coordinator:
    """
    A and B of every target layer, and the calls that tie them to the student: `pull` takes their gradients at the end of
    an update, `push` and `settle` bring what they have become into the student and the shadow.
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
        """Set the gradients of A and B: the projection of F - lambda G_hat, at iterate k and before any clipping."""
        for index, target in enumerate(self.targets):
            target.a.grad, target.b.grad = fused[index]
            if shadow is not None:
                target.a.grad = target.a.grad - policy_weight * shadow[index][0]
                target.b.grad = target.b.grad - policy_weight * shadow[index][1]

    def snapshot(self) -> Projection:
        """Copies of A and B of each target."""
        return [(target.a.detach().clone(), target.b.detach().clone()) for target in self.targets]

    def push(self, old: Projection, models: Sequence[Weights]) -> None:
        """When A and B have stepped, before theta and the shadow do."""
        raise NotImplementedError

    def settle(self, models: Sequence[Weights]) -> None:
        """When theta and the shadow have stepped too. Nothing here."""

    def subtract_from(self, weights: Weights, keep: bool) -> dict[str, torch.Tensor]:
        """Theta, or the shadow's: weights without w's part. Collective where weights are spread over ranks."""
        raise NotImplementedError

    @torch.no_grad()
    def norm(self) -> float:
        """Frobenius norm of s B A over all targets, from r x r products."""
        squares = torch.stack([target.squared_norm() for target in self.targets])
        return squares.sum().clamp(min=0).sqrt().item()

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
        return {target.name: [target.a.size(0), target.scaling] for target in self.targets}


def default_peft_config() -> LoraConfig:
    """The paper's coordinator: rank 16, alpha 16 (scale 1). Targets and dropout are choices of ours."""
    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


class ProjectedGradient(CoordinatorGradient):
    """
    Projects the gradient that has come together so far, on any backend.

    Where the engine takes gradients away (DeepSpeed), each is projected as it comes, and the sums are kept here.
    """

    def __init__(self, targets: list[Target], weights: Weights):
        super().__init__(weights)
        self.targets = targets
        self._sums: Projection | None = None
        if weights.needs_grad_hooks:
            self._sums = [(torch.zeros_like(t.a.data), torch.zeros_like(t.b.data)) for t in targets]
            for target, sums in zip(targets, self._sums, strict=True):
                weights.register_grad_hook(target.weight_name, functools.partial(_add, target, sums))

    def so_far(self) -> Projection:
        if self._sums is not None:
            return [(a.clone(), b.clone()) for a, b in self._sums]
        projection = []
        for target in self.targets:
            gradient = self.weights.gradient(target.weight_name).to(target.a.device)  # an offloaded one is on the CPU
            projection.append(target.project(gradient, self.weights.bounds(target.weight_name)[0]))
        return projection

    def clear(self) -> None:
        for pair in self._sums or []:
            for part in pair:
                part.zero_()


def _add(target: Target, sums: tuple[torch.Tensor, torch.Tensor], gradient: torch.Tensor) -> None:
    with torch.no_grad():
        for total, part in zip(sums, target.project(gradient), strict=True):
            total += part


_ADAPTER = "default"  # PEFT's own name for an adapter that has none


class MergedCoordinator(Coordinator):
    """
    A and B of every target layer, added to the weights of plain models.

    Target layers, patterns, scaling and initial values are PEFT's own: adapters are put into the model, read off, and
    taken out again.
    """

    def __init__(self, model: PreTrainedModel, peft_config: PeftConfig | None, seed: int):
        # PEFT writes the resolved targets into the configuration; the user's own stays as it was.
        peft_config = default_peft_config() if peft_config is None else copy.deepcopy(peft_config)
        check_peft_config(peft_config)
        super().__init__(_read_off_adapters(model, peft_config, seed), peft_config)
        check_targets(model, self.targets)
        self._by_weight = {target.weight_name: target for target in self.targets}

    def gradient_of(self, weights: Weights) -> ProjectedGradient:
        return ProjectedGradient(self.targets, weights)

    @torch.no_grad()
    def push(self, old: Projection, models: Sequence[Weights]) -> None:
        """Add s (B'A' - BA) to merged weights."""
        for target, (a, b) in zip(self.targets, old, strict=True):
            change = functools.cache(functools.partial(target.change, a, b))
            for weights in models:
                weights.add_(target.weight_name, change)

    @torch.no_grad()
    def merge_into(self, weights: Weights) -> None:
        """Add s B A to the weights of a plain model, once, at the start."""
        for target in self.targets:
            weights.add_(target.weight_name, target.product_rows)

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Whether s B A is zero everywhere, as with PEFT's default initial values."""
        return all(not target.product().any() for target in self.targets)

    @torch.no_grad()
    def subtract_from(self, weights: Weights, keep: bool) -> dict[str, torch.Tensor]:
        """Weights less s B A."""
        state = {}
        for name in weights.parameters:
            weight = weights.full(name)
            if keep:
                target = self._by_weight.get(name)
                base = weight if target is None else weight - target.product().to(weight.device)
                state[name] = base.float().cpu().clone()
        return state

    @torch.no_grad()
    def overlap(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Inner product of some rows of a merged weight with those of s B A, from products of the adapters' size."""
        target = self._by_weight.get(name)
        if target is None:
            return torch.zeros((), dtype=torch.float64, device=rows.device)
        projected, _ = target.project(rows, first)  # s B^T M
        return (projected.double() * target.a.double()).sum()


def _read_off_adapters(model: PreTrainedModel, peft_config: PeftConfig, seed: int) -> list[Target]:
    asked = list(peft_config.target_parameters or [])  # as the user has them: PEFT turns module names into others
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, peft_config, _ADAPTER)
        except ValueError as error:
            keys = "`peft_config.target_modules`" + (" or `peft_config.target_parameters`" if asked else "")
            raise ValueError(f"{keys} cannot be used: {error}") from error
    try:
        return _targets_of(model, asked)
    finally:
        tuner.unload()
        # PEFT leaves its configuration behind on the model, where TRL and transformers would read it.
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def _targets_of(model: PreTrainedModel, parameters: list[str]) -> list[Target]:
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    check_layers(layers, _ADAPTER, parameters)
    return [_target_of(name, layer) for name, layer in layers.items()]


def _target_of(name: str, layer: Any) -> Target:
    base = layer.get_base_layer()
    shared: dict[str, Any] = {
        "module": name,
        "a": nn.Parameter(layer.lora_A[_ADAPTER].weight.detach().float().clone()),
        "b": nn.Parameter(layer.lora_B[_ADAPTER].weight.detach().float().clone()),
        "scaling": float(layer.scaling[_ADAPTER]),
    }
    if isinstance(layer, ParamWrapper):
        # As PEFT asks which way round experts are: gpt-oss has (experts, in_features, out_features).
        transposed = getattr(base, "is_transposed", False)
        return ExpertsTarget(
            **shared, transposed=transposed, parameter=layer.parameter_name, experts=layer.num_experts
        )
    return Target(**shared, transposed=isinstance(base, Conv1D))


def save_adapter(coordinator: Coordinator, output_dir: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in coordinator.state_dict().items()}
    # The mark by which `trl-bridge merge` knows it: merged into the saved policy, which holds it already, w would count twice.
    save_file(tensors, output_dir / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt", "trl_bridge": "coordinator"})
    config = coordinator.peft_config
    config.inference_mode = True
    config.save_pretrained(str(output_dir))
