"""
Lean mode: theta, w and theta_hat as slices of LoRA adapters on one frozen base (`docs/bridge.md`, a deviation from the
paper). What is refused, and how the parts are built; to TRL's trainer the student is a model with one LoRA adapter.
"""

import copy
import hashlib
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ....training.backends import Backend
from ..config import BridgeConfig
from ..coordinator import default_peft_config
from ..targets import check_layers, check_peft_config
from .coordinator import LeanCoordinator, initial_values
from .weights import ADAPTER, AdapterWeights, adapter_pairs, lora_layers


def check_lean(model: Any, peft_config: PeftConfig | None, optimizers: Any) -> None:
    """Refuse arguments of the trainer that lean mode cannot use."""
    adapted = isinstance(model, nn.Module) and any(isinstance(m, BaseTunerLayer) for m in model.modules())
    if isinstance(model, PeftModel) or adapted:
        raise TypeError(
            "`model` already has an adapter. With `lean=True` the adapter is made by the trainer: pass the plain model "
            "(`model.merge_and_unload()`)."
        )
    if optimizers is not None and any(part is not None for part in optimizers):
        raise NotImplementedError(
            "`optimizers` is not supported with `lean=True`: the adapter that they would have to hold is made by the "
            "trainer. Choose by `optim` and `lr_scheduler_type`."
        )
    if peft_config is None:
        return
    check_peft_config(peft_config)
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(peft_config, name):
            raise NotImplementedError(
                f"`peft_config.{name}` is not supported with `lean=True`: theta and w share one adapter, of one rank and "
                "one scaling everywhere. Remove it."
            )
    if peft_config.target_parameters:
        raise NotImplementedError(
            "`peft_config.target_parameters` is not supported with `lean=True`: theta and w share the rows of one adapter, and "
            "those of fused experts belong to one expert each. Remove it."
        )
    init = peft_config.init_lora_weights
    if isinstance(init, str) and init != "gaussian":
        raise NotImplementedError(
            f"`peft_config.init_lora_weights`={init!r} is not supported with `lean=True`: it may change the base, which "
            "is frozen. Use True, False or 'gaussian'."
        )


def slices(args: BridgeConfig, peft_config: PeftConfig | None) -> tuple[LoraConfig, LoraConfig, tuple[float, float]]:
    """Theta's and w's adapters."""
    own: Any = default_peft_config() if peft_config is None else copy.deepcopy(peft_config)
    own.inference_mode = False  # as a saved adapter's has it, whose shape is taken over here
    theta = copy.deepcopy(own)
    theta.r, theta.lora_alpha = args.lean_lora_r, args.lean_alpha
    theta.use_rslora, theta.init_lora_weights = False, True
    scaling = own.lora_alpha / (own.r**0.5 if own.use_rslora else own.r)
    return theta, own, (theta.lora_alpha / theta.r, scaling)


def students_adapter(args: BridgeConfig, peft_config: PeftConfig | None) -> LoraConfig:
    """The one adapter that TRL puts into the model: both ranks, under theta's scaling."""
    theta, own, _ = slices(args, peft_config)
    rank = theta.r + own.r
    alpha: Any = theta.lora_alpha * rank / theta.r
    theta.r, theta.lora_alpha = rank, int(alpha) if alpha == int(alpha) else alpha
    return theta


def build_student(
    model: PeftModel, backend: Backend, args: BridgeConfig, peft_config: PeftConfig | None
) -> tuple[LeanCoordinator, AdapterWeights]:
    """The coordinator, and the student's weights with the initial values of theta and w in them. Collective."""
    check_layers(lora_layers(model), ADAPTER)
    theta, own, scalings = slices(args, peft_config)
    initial_theta, initial_w = initial_values(model, [theta, own], args.seed)
    coordinator = LeanCoordinator(
        {module: (a.to(backend.device), b.to(backend.device)) for module, (a, b) in initial_w.items()}, own, scalings
    )
    parameters = adapter_pairs(model, ADAPTER)
    with torch.no_grad():
        for module, (a, b) in parameters.items():
            for parameter in (a, b):
                # TRL rounds the adapters of a quantised base to 16 bits, where small steps would be lost. Where there
                # is a master in float32, the working weights are as the engine wants them.
                if not backend.keeps_master:
                    parameter.data = parameter.data.float()
            first_a, first_b = initial_theta[module]
            a[: theta.r], b[:, : theta.r] = first_a, first_b
    pairs = [parameter.data for pair in parameters.values() for parameter in pair]
    backend.broadcast_([*pairs, *(parameter.data for parameter in coordinator.parameters())])
    weights = student_weights(model, backend, theta.r)
    coordinator.settle([weights])
    return coordinator, weights


def student_weights(model: PeftModel, backend: Backend, rank: int) -> AdapterWeights:
    """The student's LoRA weights as they are held now, before or after it has been prepared."""
    return AdapterWeights(adapter_pairs(model, ADAPTER), rank, backend.weights(model))


def base_identity(model: nn.Module, backend: Backend) -> str:
    """
    What tells one frozen base from another: its dtypes, its quantisation and sums over its weights, as a hash. Collective.
    """
    told = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            continue
        with backend.readable(parameter):
            if backend.rank > 0:
                continue
            # Bytes of packed 4-bit weights tell them apart as well. Rounded, since devices add up in orders of their own.
            floating = parameter.is_floating_point()
            total = parameter.detach().sum(dtype=torch.float64 if floating else torch.int64).item()
            told.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {total:.6e};".encode())
    # The main process's: the others may hold nothing yet.
    return broadcast_object_list([told.hexdigest()[:16]])[0]
