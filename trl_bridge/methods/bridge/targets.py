"""One weight of the coordinator, and what it can be and act on: additive LoRA on weights that no other layer uses, in full precision."""

import dataclasses
from collections.abc import Collection, Mapping
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
        "inference_mode", "r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "fan_in_fan_out", "use_rslora",
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

    @property
    def name(self) -> str:
        """Of the layer, or of the weight where it is not called so."""
        return self.weight_name.removesuffix(".weight")

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (out_features, in_features), or back."""
        return tensor.mT if self.transposed else tensor

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

    def matrices(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (rank, in_features) and B as (out_features, rank), or a stack of such."""
        return a, b

    def squared_norm(self) -> torch.Tensor:
        """Squared Frobenius norm of s B A, from r x r products."""
        a, b = self.matrices(self.a.detach(), self.b.detach())
        return self.scaling**2 * ((b.mT @ b).double() * (a @ a.mT).double()).sum()


@dataclasses.dataclass
class ExpertsTarget(Target):
    """The fused weights of a layer's experts: a product for each, and an expert is a row. A and B are laid out as PEFT's."""

    parameter: str
    experts: int

    @property
    def weight_name(self) -> str:
        return parameter_name(self.module, self.parameter)

    def matrices(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A as (experts, rank, in_features) and B as (experts, out_features, rank)."""
        return a.reshape(self.experts, -1, a.size(1)), b.reshape(b.size(0), -1, self.experts).permute(2, 0, 1)

    def product(self) -> torch.Tensor:
        return self.product_rows(0, self.experts)

    def product_rows(self, first: int, last: int) -> torch.Tensor:
        a, b = self.matrices(self.a.detach(), self.b.detach())
        return self.oriented(self.scaling * (b[first:last] @ a[first:last]))

    def project(self, gradient: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.matrices(self.a.detach(), self.b.detach())
        g, rows = self.oriented(gradient).to(a.dtype), slice(first, first + gradient.size(0))
        grad_a = _placed(self.scaling * (b[rows].mT @ g), a, (rows,))
        grad_b = _placed(self.scaling * (g @ a[rows].mT), b, (rows,))
        return grad_a.reshape(self.a.shape), grad_b.permute(1, 2, 0).reshape(self.b.shape)

    @torch.no_grad()
    def change(self, old_a: torch.Tensor, old_b: torch.Tensor, first: int, last: int) -> torch.Tensor:
        a, b = (part[first:last] for part in self.matrices(self.a.detach(), self.b.detach()))
        old_a, old_b = (part[first:last] for part in self.matrices(old_a, old_b))
        return self.oriented(self.scaling * ((b - old_b) @ a + old_b @ (a - old_a)))


def parameter_name(module: str, parameter: str) -> str:
    """The plain model's name of a parameter that PEFT wraps: a module once for each, one wrapper in another."""
    return f"{module.replace('.base_layer', '')}.{parameter}"


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
    if config.target_parameters and isinstance(init, str) and init != "gaussian":
        raise ValueError(
            f"`peft_config.init_lora_weights`={init!r} is not supported with `target_parameters`: PEFT computes it for linear "
            "layers. Use True, False or 'gaussian'."
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


def check_layers(layers: Mapping[str, Any], adapter: str, parameters: Collection[str] = ()) -> None:
    """
    Refuse layers on which PEFT's adapter is no product of two matrices that is added to one weight, nor to each of those
    experts that were asked for as `parameters`.
    """
    wrapped = {n: parameter_name(n, x.parameter_name) for n, x in layers.items() if isinstance(x, ParamWrapper)}
    for asked in parameters:
        if not any(_ends(name, asked) for name in wrapped.values()):
            raise ValueError(f"`peft_config.target_parameters` names {asked!r}, which no parameter of `model` is.")
    for name, layer in layers.items():
        kind = type(layer.get_base_layer()).__name__
        if name in wrapped and any(_ends(wrapped[name], asked) for asked in parameters):
            if dimensions(layer.get_param()) != 3:
                raise ValueError(
                    f"`peft_config.target_parameters` matches `{layer.parameter_name}` of {name!r}, a {kind}, which does not "
                    "hold a matrix for each expert. Remove it, and name linear layers in `target_modules`."
                )
            continue
        if name in wrapped:
            raise ValueError(
                f"`peft_config.target_modules` matches `{layer.parameter_name}` of {name!r}, a {kind}; the coordinator "
                'acts on linear layers, and this is none. Name linear layers only, or set it to "all-linear"; without '
                "`lean=True`, `target_parameters` takes fused experts."
            )
        if adapter not in layer.lora_A or layer.lora_A[adapter].weight.dim() != 2 or is_router(layer.get_base_layer()):
            raise ValueError(
                f"`peft_config.target_modules` matches {name!r}, a {kind}; the coordinator acts on linear layers. "
                "Exclude it (`exclude_modules`)."
            )
        if not layer.lora_A[adapter].weight.requires_grad:
            raise _frozen(name)


def _ends(name: str, asked: str) -> bool:
    return f".{name}".endswith(f".{asked}")


def _frozen(name: str) -> ValueError:
    return ValueError(
        f"`peft_config.target_modules` matches {name!r}, which `freeze_vision_tower` freezes. Exclude it (`exclude_modules`), or set "
        "`freeze_vision_tower=False`."
    )


def note_fused_experts(model: Any, targets: list[Target]) -> None:
    """Say in the log which experts are no targets."""
    told: Any = model.get_decoder() if hasattr(model.config, "vision_config") else model
    taken = {id(model.get_parameter(target.weight_name)) for target in targets if isinstance(target, ExpertsTarget)}
    fused = {
        (type(module).__name__, f"{name.rpartition('.')[2]}.{own}")
        for name, module in told.named_modules()
        for own, weight in module._parameters.items()
        if weight is not None
        and dimensions(weight) == 3
        and id(weight) not in taken
        and not isinstance(module, nn.Conv1d)
    }
    if fused:
        kinds, names = ({pair[index] for pair in fused} for index in (0, 1))
        logger.warning(
            f"The coordinator leaves the fused weights of {', '.join(sorted(kinds))} out: it acts on linear layers. Without "
            f"`lean=True`, a `peft_config` with `target_parameters={sorted(names)}` has it act on them too."
        )


def check_targets(model: PreTrainedModel, targets: list[Target]) -> None:
    """Refuse target layers that the merged form would compute differently from an adapter."""
    if not targets:
        raise ValueError("`peft_config.target_modules` matches no layer of `model`.")
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        for own, weight in module._parameters.items():
            users.setdefault(id(weight), []).append(name if own == "weight" else f"{name}.{own}")
    for target in targets:
        owner, _, own = target.weight_name.rpartition(".")
        module, fused = modules[owner], isinstance(target, ExpertsTarget)
        weight = module._parameters.get(own)
        if weight is None or isinstance(module, nn.Embedding) or dimensions(weight) != 2 + fused:
            raise ValueError(
                f"`peft_config.target_modules` matches {target.name!r}, a {type(module).__name__}; the coordinator "
                "acts on linear layers. Exclude it (`exclude_modules`)."
            )
        if not weight.requires_grad:
            raise _frozen(target.name)
        shared = users[id(weight)]
        if len(shared) > 1:
            raise ValueError(
                f"`peft_config.target_modules` matches {target.name!r}, whose weight is tied to "
                f"{next(n for n in shared if n != target.name)!r}: merged, the coordinator would act on both. "
                "Exclude it (`exclude_modules`)."
            )
