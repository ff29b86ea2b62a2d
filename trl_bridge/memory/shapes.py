"""Shapes of models for the memory formulas: from a config, on the meta device, without any weight."""

from pathlib import Path
from typing import Any

from .formulas import ModelShape


_QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
SIZES: dict[str, dict[str, Any]] = {
    "1.5B": {**_QWEN, "vocab_size": 151936, "tie_word_embeddings": True, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "3B": {**_QWEN, "vocab_size": 151936, "tie_word_embeddings": True, "hidden_size": 2048, "intermediate_size": 11008,
           "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
    "7B": {**_QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "14B": {**_QWEN, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8},
    "32B": {**_QWEN, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "num_key_value_heads": 8},
    "70B": {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, "hidden_size": 8192,
            "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
"""Configs by size: those of Qwen2.5, and of Llama 3.1 70B."""


def config_of_size(size: str) -> Any:
    """A config by the size of its model."""
    from transformers import AutoConfig

    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}: choose from {', '.join(SIZES)}, or name a model with `--model`")
    values = dict(SIZES[size])
    return AutoConfig.for_model(values.pop("model_type"), **values)


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
