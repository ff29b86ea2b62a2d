"""Shapes of models for the memory formulas: by size, or from a config, on the meta device, without any weight."""

from pathlib import Path
from typing import Any

from .formulas import ModelShape


# Counted by `shape_of`, which needs torch and transformers: seconds, for a sum.
SIZES = {
    "1.5B": ModelShape(1543714304, 233375232, 46797824, 28, 1536, 8960, 151936, 1536, 1154048),
    "3B": ModelShape(3085938688, 311166976, 77076992, 36, 2048, 11008, 151936, 2048, 1870848),
    "7B": ModelShape(7615616512, 1089998336, 233057792, 28, 3584, 18944, 152064, 3584, 2523136),
    "14B": ModelShape(14770033664, 1557140480, 275268608, 48, 5120, 13824, 152064, 5120, 4300800),
    "32B": ModelShape(32763876352, 1557140480, 487605248, 64, 5120, 27648, 152064, 5120, 8388608),
    "70B": ModelShape(70553706496, 2101354496, 855654400, 80, 8192, 28672, 128256, 8192, 12943360),
}
"""Shapes by size: those of Qwen2.5, and of Llama 3.1 70B."""


def shape_of_size(size: str) -> ModelShape:
    """A shape by the size of its model."""
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}: choose from {', '.join(SIZES)}, or name a model with `--model`")
    return SIZES[size]


def load_config(name: str) -> Any:
    """A model's config. Nothing else of it is read or downloaded."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(Path(name).expanduser()) if Path(name).expanduser().exists() else name)


def shape_of(config: Any) -> ModelShape:
    """Count a model's weights on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in names]
    text = config.get_text_config()
    intermediate = getattr(text, "intermediate_size", None)
    if not layers or intermediate is None:
        raise ValueError(
            f"the memory of a {config.model_type!r} model is not known: its layers are not those of a decoder"
        )
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        parameters=parameters,
        root_parameters=parameters - sum(sizes),
        layer_parameters=max(sizes),
        layers=len(layers),
        hidden_size=text.hidden_size,
        intermediate_size=intermediate,
        vocab_size=text.vocab_size,
        attention_size=text.num_attention_heads * head_size,
        adapter_width=sum(linear.in_features + linear.out_features for linear in linears),
    )
