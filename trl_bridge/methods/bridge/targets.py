"""One layer of the coordinator, and what it can be and act on: additive LoRA on layers whose weight no other uses, in full precision."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from ..._upstream import is_router


logger = get_logger(__name__)

# Fields of `LoraConfig` that say where the adapter is, how large, and what it starts from: all are PEFT's own to read.
_SHAPES = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    }
)  # fmt: skip
_INITIAL_VALUES = frozenset({"gaussian", "olora", "orthogonal", "pissa"})
_REASONS = {
    "use_dora": "DoRA rescales the base weights. Set `use_dora=False`",
    "modules_to_save": "the coordinator is s B A alone. Remove it",
    "bias": "the coordinator is s B A alone. Set `bias='none'`",
    "lora_bias": "a bias of B is not part of theta + w. Set `lora_bias=False`",
    "lora_dropout": "the coordinator is added to the weights, where there is no input to drop. Set it to 0",
    "target_parameters": "w is held as one product for each linear layer, and fused experts have one for each expert. Use `target_modules`",
    "layer_replication": "it changes the model. Remove it",
    "trainable_token_indices": "the coordinator is s B A alone. Remove it",
}


# For each target a tensor of A's shape and one of B's.
Projection = list[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Target:
    """One layer that the coordinator acts on."""

    module: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    transposed: bool

    @property
    def weight_name(self) -> str:
        """Name of the layer's weight in the plain model."""
        return f"{self.module}.weight"

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (out_features, in_features), or back."""
        return tensor.T if self.transposed else tensor

    def product(self) -> torch.Tensor:
        """s B A in the weight's own orientation."""
        return self.oriented(self.scaling * (self.b.detach() @ self.a.detach()))

    def product_rows(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last of s B A, in the weight's own orientation."""
        return self.product()[first:last]

    def project(self, gradient: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The part that some rows of a gradient have in s B^T G and s G A^T."""
        a, b = self.a.detach(), self.b.detach()
        g = self.oriented(gradient).to(a.dtype)
        rows = slice(first, first + gradient.size(0))
        if self.transposed:
            grad_a, grad_b = self.scaling * (b.T @ g), self.scaling * (g @ a[:, rows].T)
            return _placed(grad_a, a, (slice(None), rows)), grad_b
        grad_a, grad_b = self.scaling * (b[rows].T @ g), self.scaling * (g @ a.T)
        return grad_a, _placed(grad_b, b, (rows,))

    @torch.no_grad()
    def change(self, old_a: torch.Tensor, old_b: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows first to last of s (B'A' - BA), in the weight's own orientation."""
        a, b, rows = self.a.detach(), self.b.detach(), slice(first, last)
        # Written as a sum of two small terms: the difference of the two products would cancel.
        if self.transposed:
            a, old_a = a[:, rows], old_a[:, rows]
        else:
            b, old_b = b[rows], old_b[rows]
        return self.oriented(self.scaling * ((b - old_b) @ a + old_b @ (a - old_a)))


def _placed(part: torch.Tensor, like: torch.Tensor, where: tuple[slice, ...]) -> torch.Tensor:
    if part.shape == like.shape:
        return part
    whole = torch.zeros_like(like)
    whole[where] = part
    return whole


def check_base_model(model: PreTrainedModel, keeps_master: bool = False, tower_is_frozen: bool = False) -> None:
    """Refuse a base model that cannot hold theta + w."""
    if isinstance(model, PeftModel):
        raise TypeError(
            "`model` already is a PEFT model. BridgeTrainer trains the base itself and builds the coordinator from "
            "`peft_config`: pass the plain model (`model.merge_and_unload()`)."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "`model` is quantised, and its weights cannot be trained. Pass it in float32 (`dtype=torch.float32`)."
        )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen and not tower_is_frozen:
        raise ValueError(
            f"`model` has {len(frozen)} frozen parameters (the first is {frozen[0]!r}), but BRIDGE trains the whole "
            "base. Call `model.requires_grad_(True)`."
        )
    half = [name for name, p in model.named_parameters() if p.dtype not in (torch.float32, torch.float64)]
    if half and not keeps_master:
        dtype = str(dict(model.named_parameters())[half[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"`model` holds {half[0]!r} in {dtype}: the coordinator's small steps would be rounded away. Load it with "
            "`dtype=torch.float32` (`dtype: float32` in a recipe); `bf16=True` still computes in bfloat16."
        )


def check_peft_config(config: PeftConfig) -> None:
    """Refuse adapters other than additive LoRA."""
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"`peft_config` must be a `LoraConfig`, got `{type(config).__name__}`: the coordinator is added to the "
            "weights, theta + w."
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init not in _INITIAL_VALUES and not init.startswith("pissa_niter_"):
        raise ValueError(
            f"`peft_config.init_lora_weights`={init!r} is not supported: it needs data or a quantised base. Use True, "
            f"False, {', '.join(map(repr, sorted(_INITIAL_VALUES)))} or 'pissa_niter_N'."
        )
    defaults = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _SHAPES or value == getattr(defaults, field.name) or not value:
            continue
        reason = _REASONS.get(field.name, "it is not plain additive LoRA, s B A. Leave it at its default")
        raise ValueError(f"`peft_config.{field.name}` is not supported: {reason}.")


def check_initial_values(config: PeftConfig | None) -> None:
    """
    Refuse initial values that are computed from the weights, where a rank does not hold them when the trainer is built.
    """
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init != "gaussian":
        raise ValueError(
            f"`peft_config.init_lora_weights`={init!r} is computed from the weights, which not every rank holds here. "
            "Set it to True, or load them everywhere (`fsdp_cpu_ram_efficient_loading: false`, `zero3_init_flag: "
            "false`)."
        )


def dimensions(weight: nn.Parameter) -> int:
    """Number of dimensions of a weight, which ZeRO-3 may have partitioned already."""
    return len(getattr(weight, "ds_shape", weight.shape))


def check_layers(layers: Mapping[str, Any], adapter: str) -> None:
    """Refuse layers on which PEFT's adapter is no product of two matrices that is added to one weight."""
    for name, layer in layers.items():
        kind = type(layer.get_base_layer()).__name__
        if isinstance(layer, ParamWrapper):
            raise ValueError(
                f"`peft_config.target_modules` matches `{layer.parameter_name}` of {name!r}, a {kind}; the coordinator "
                'acts on linear layers, and this is none. Name linear layers only, or set it to "all-linear".'
            )
        if adapter not in layer.lora_A or layer.lora_A[adapter].weight.dim() != 2 or is_router(layer.get_base_layer()):
            raise ValueError(
                f"`peft_config.target_modules` matches {name!r}, a {kind}; the coordinator acts on linear layers. "
                "Exclude it (`exclude_modules`)."
            )
        if not layer.lora_A[adapter].weight.requires_grad:
            raise _frozen(name)


def _frozen(name: str) -> ValueError:
    return ValueError(
        f"`peft_config.target_modules` matches {name!r}, which `freeze_vision_tower` freezes. Exclude it (`exclude_modules`), or set "
        "`freeze_vision_tower=False`."
    )


def note_fused_experts(model: Any) -> None:
    """Say in the log which weights no target can be."""
    told: Any = model.get_decoder() if hasattr(model.config, "vision_config") else model
    fused = {
        type(module).__name__
        for module in told.modules()
        for weight in module._parameters.values()
        if weight is not None and dimensions(weight) == 3 and not isinstance(module, nn.Conv1d)
    }
    if fused:
        logger.warning(
            f"The coordinator leaves the fused weights of {', '.join(sorted(fused))} out: it acts on linear layers."
        )


def check_targets(model: PreTrainedModel, targets: list[Target]) -> None:
    """Refuse target layers that the merged form would compute differently from an adapter."""
    if not targets:
        raise ValueError("`peft_config.target_modules` matches no layer of `model`.")
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    for target in targets:
        module = modules[target.module]
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, nn.Embedding) or dimensions(weight) != 2:
            raise ValueError(
                f"`peft_config.target_modules` matches {target.module!r}, a {type(module).__name__}; the coordinator "
                "acts on linear layers. Exclude it (`exclude_modules`)."
            )
        if not weight.requires_grad:
            raise _frozen(target.module)
        shared = users[id(weight)]
        if len(shared) > 1:
            raise ValueError(
                f"`peft_config.target_modules` matches {target.module!r}, whose weight is tied to "
                f"{next(n for n in shared if n != target.module)!r}: merged, the coordinator would act on both. "
                "Exclude it (`exclude_modules`)."
            )
