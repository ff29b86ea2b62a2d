"""
The coordinator `w` in merged form, beside the plain student.

For a linear layer the student holds M = theta + s B A, and theta is never stored. By the chain rule the gradient with
respect to theta is the one with respect to M, and those of A and B are its projections s B^T G and s G A^T
(`docs/bridge.md`).
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraModel, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..training.backends import Weights
from .coordinator import Coordinator, default_peft_config
from .projection import ProjectedGradient
from .targets import Projection, Target, check_peft_config, check_targets


_ADAPTER = "default"  # PEFT's own name for an adapter that has none


class MergedCoordinator(Coordinator):
    """
    A and B of every target layer, added to the weights of plain models.

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
            weight = weights.whole(name)
            if keep:
                target = self._by_weight.get(name)
                base = weight if target is None else weight - target.product().to(weight.device)
                state[name] = base.float().cpu().clone()
        return state

    @torch.no_grad()
    def overlap(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """
        Inner product of some rows of a merged weight with those of s B A, from products of the adapters' size.

        Args:
            name (`str`):
                The weight's name.
            rows (`torch.Tensor`):
                Its rows from `first` on.
            first (`int`):
                Number of the first row.

        Returns:
            `torch.Tensor`: a scalar, float64; zero for a weight that is no target.
        """
        target = self._by_weight.get(name)
        if target is None:
            return torch.zeros((), dtype=torch.float64, device=rows.device)
        projected, _ = target.project(rows, first)  # s B^T M
        return (projected.double() * target.a.double()).sum()


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
