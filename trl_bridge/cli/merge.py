"""`trl-bridge merge`: a LoRA adapter and its model become one plain model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .errors import ToolParser, UsageError


_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER = "tokenizer_config.json"


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    output = merge_adapter(options.adapter, options.output_dir, base=options.base, force=options.force)
    sys.stdout.write(f"wrote the merged model to {output}\n")
    return 0


def merge_adapter(adapter: str | Path, output_dir: str | Path, base: str | None = None, force: bool = False) -> Path:
    """Merge an adapter into its model and save both as a plain model, in the model's own dtype, with the tokenizer."""
    adapter, output = Path(adapter).expanduser(), Path(output_dir).expanduser()
    config = _adapter_config(adapter)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{adapter} does not name the model that it was trained on: name it with --base")
    inputs = {adapter.resolve(), Path(name).expanduser().resolve()}
    if output.resolve() in inputs:
        raise ValueError(f"`--output_dir {output}` holds the adapter or its model: name another folder")
    if not force and ((output / "config.json").exists() or (output / _CONFIG).exists()):
        raise ValueError(f"{output} holds a model already; --force overwrites it")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, revision=config.get("revision") or "main", dtype="auto")
    if getattr(model, "is_quantized", False):
        model = model.dequantize()  # what the adapter was trained on; merged into 4 or 8 bits it would be rounded away
    tokenizer = _tokenizer(adapter, name)
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # Tokens that training added: the adapter's embeddings have the larger shape.
        model.resize_token_embeddings(len(tokenizer))
    adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
    expected = _logits(adapted)
    _untie(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if not (head.weight.shape == embedding.weight.shape and bool((head.weight == embedding.weight).all())):
        merged.config.tie_word_embeddings = False  # else the saved head would be read back as the embedding
    merged.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    plain: Any = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    saved = _logits(plain.eval())
    error, size = (saved - expected).abs().max().item(), expected.abs().max().item()
    # Merging rounds each weight once: 1e-4 of the logits in float32, some percent in 16 bits.
    if not error <= (1e-3 if merged.dtype.itemsize > 2 else 0.1) * max(size, 1.0):
        raise ValueError(
            f"{output} is not what {adapter} trained: its logits are off by up to {error:.2g} (of {size:.2g}). This kind of "
            "adapter cannot be merged; load it with PEFT instead."
        )
    return output


def _logits(model: Any) -> Any:
    """Logits of a few tokens, float32."""
    import torch

    ids = torch.arange(min(16, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits.float()


def _untie(adapted: Any) -> None:
    """Give a wrapped head a weight of its own: merged into one that is shared, the adapter would change the embedding too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    modules: tuple[Any, ...] = (adapted.get_output_embeddings(), adapted.get_input_embeddings())
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = ToolParser(prog="trl-bridge merge", description="Merge a LoRA adapter into its model.")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or a checkpoint that holds one")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write the plain model to")
    parser.add_argument("--base", help="model that the adapter was trained on, if not the one that the adapter names")
    parser.add_argument("--force", action="store_true", help="overwrite a model in the output folder")
    return parser.parse_args(argv)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """Config of an adapter that can be merged; everything else is refused with what to do."""
    if not adapter.is_dir():
        raise FileNotFoundError(f"there is no folder {adapter}")
    if not (adapter / _CONFIG).is_file():
        if (adapter / "config.json").is_file():
            raise UsageError(
                f"{adapter} is a plain model already: there is nothing to merge. What BRIDGE saves is theta + w, merged."
            )
        checkpoints = sorted(adapter.glob(f"*/{_CONFIG}"), key=lambda path: path.stat().st_mtime)
        hint = f"; did you mean {checkpoints[-1].parent}?" if checkpoints else ""
        raise UsageError(f"{adapter} holds no {_CONFIG}, so it is no adapter{hint}")
    if _is_coordinator(adapter / _WEIGHTS):
        raise UsageError(
            f"{adapter} is a coordinator that BRIDGE saved to look at. The model that BRIDGE saved holds it already, so "
            "merging would count w twice: use that model as it is."
        )
    config = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UsageError(f"{adapter} is an adapter for {config['task_type']}; only causal language models are merged")
    return config


def _is_coordinator(weights: Path) -> bool:
    from safetensors import safe_open

    if not weights.is_file():
        return False
    with safe_open(weights, framework="pt") as file:
        return (file.metadata() or {}).get("trl_bridge") == "coordinator"


def _tokenizer(adapter: Path, base: str) -> Any:
    """The adapter's tokenizer, else the model's; none where a local model has none."""
    from transformers import AutoTokenizer

    if (adapter / _TOKENIZER).is_file():
        return AutoTokenizer.from_pretrained(adapter)
    if Path(base).is_dir() and not (Path(base) / _TOKENIZER).is_file():
        return None
    return AutoTokenizer.from_pretrained(base)
