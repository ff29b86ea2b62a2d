"""Tiny vision-language models of three families with their processors, made without a download, and rows with pictures."""

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig

from trl_bridge import BridgeTrainer
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.runs import small_config, small_trainer


SIDE = 16  # of a picture, in pixels
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}


class _Qwen(Qwen2_5_VLProcessor):
    """Without its processor of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        for kind in ("image", "video"):
            setattr(self, f"{kind}_token", getattr(tokenizer, f"{kind}_token"))
            setattr(self, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tokenizer(**special):
    plain = tiny_tokenizer(chat_template=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        eos_token=plain.eos_token,
        unk_token=plain.unk_token,
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )


def _template(picture):
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
        "{{ '"
        + picture
        + "' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _ids(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen():
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    ends = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = _tokenizer(**names, **ends)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=SIDE**2, max_pixels=SIDE**2
    )
    processor = _Qwen(pictures, tokenizer, chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    tower = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **_ids(tokenizer), "rope_parameters": rope},
        vision_config={**tower, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in {**names, **ends}.items()},
        tie_word_embeddings=False,
        dtype="float32",
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _gemma():
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(**names)
    pictures = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(pictures, tokenizer, chat_template=_template("<start_of_image>"), image_seq_length=4)
    config = Gemma3Config(
        text_config={**TEXT, **_ids(tokenizer), "sliding_window": 16},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return Gemma3ForConditionalGeneration(config), processor


def _smol():
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    ends = {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = _tokenizer(**names, **ends)
    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    pictures = Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    # SmolVLM's own prepares pictures as Idefics3's does; it needs num2words and torchvision, for videos.
    processor = Idefics3Processor(pictures, tokenizer, chat_template=_template("<image>"), image_seq_len=4)
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return SmolVLMForConditionalGeneration(config), processor


FAMILIES = {"qwen2_5_vl": _qwen, "gemma3": _gemma, "smolvlm": _smol}


def vision_model(family="qwen2_5_vl"):
    """Model and processor of a family, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, processor = FAMILIES[family]()
    for parameter in model.parameters():
        # A fresh connector is zero or so small that no picture would show in the loss.
        if parameter.dim() == 2 and parameter.std() < 0.05:
            parameter.data.normal_(0, 0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval(), processor


def picture(number):
    """A picture of its own for each number."""
    noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def asked(number):
    return [{"role": "user", "content": f"{number % 4}+{number % 3}="}]


def picture_rows(count=16, pictures=lambda n: 1):
    return Dataset.from_list(
        [{"prompt": asked(n), "images": [picture(n + 50 * k) for k in range(pictures(n))]} for n in range(count)]
    )


def picture_demonstrations(count=8):
    """Of very different lengths, one without a picture and one with two."""
    answers = [[{"role": "assistant", "content": f"{n}" + "!" * (3 * (n % 4))}] for n in range(count)]
    pictures = [[picture(100 + n + k) for k in range({2: 0, 5: 2}.get(n, 1))] for n in range(count)]
    rows = zip(range(count), answers, pictures, strict=True)
    return Dataset.from_list([{"prompt": asked(n), "completion": a, "images": p} for n, a, p in rows])


def digits(completions, **kwargs):
    return [float(sum(c.isdigit() for c in answer[0]["content"])) for answer in completions]


def vision_trainer(folder, trainer_class, family="qwen2_5_vl", **changes):
    model, processor = vision_model(family)
    options = {"train_dataset": picture_rows(), "reward_funcs": digits, "processing_class": processor, "model": model}
    options |= {
        name: changes.pop(name) for name in {*options, "callbacks", "sft_dataset", "eval_dataset"} & set(changes)
    }
    if hasattr(trainer_class, "demonstrations_due"):
        options.setdefault("sft_dataset", picture_demonstrations())
    if issubclass(trainer_class, BridgeTrainer):
        return small_trainer(folder, trainer_class, **options, **changes)
    adapter = changes.pop("peft_config", None)
    args = small_config(folder, getattr(trainer_class, "config_class", GRPOConfig), **changes)
    return small_trainer(folder, trainer_class, args=args, grpo_adapter=adapter, **options)
