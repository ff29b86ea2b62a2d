"""Pictures that a method or a model does not see are refused by name, not trained on without being seen."""

import pytest
from datasets import Dataset, DatasetDict
from transformers import LlavaConfig, LlavaForConditionalGeneration, ProcessorMixin

from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_model
from trl_bridge import (
    AOPDConfig,
    AOPDTrainer,
    BridgeConfig,
    BridgeTrainer,
    LightningOPDConfig,
    LightningOPDTrainer,
    LUFFYConfig,
    LUFFYTrainer,
    NaiveMixConfig,
    NaiveMixTrainer,
    OPDConfig,
    OPDTrainer,
    TwoStageConfig,
    TwoStageTrainer,
)
from trl_bridge.models import tiny_tokenizer


GROUP = rl_rows().add_column("expert", ["1"] * len(rl_rows()))
CASES = {
    BridgeTrainer: (BridgeConfig, {"reward_funcs": digits_reward, "sft_dataset": sft_rows()}),
    NaiveMixTrainer: (NaiveMixConfig, {"reward_funcs": digits_reward, "sft_dataset": sft_rows()}),
    LUFFYTrainer: (LUFFYConfig, {"reward_funcs": digits_reward, "train_dataset": GROUP}),
    TwoStageTrainer: (TwoStageConfig, {"reward_funcs": digits_reward, "sft_dataset": sft_rows()}),
    OPDTrainer: (OPDConfig, {"teacher_model": "t"}),
    AOPDTrainer: (AOPDConfig, {"teacher_model": "t"}),
    LightningOPDTrainer: (LightningOPDConfig, {}),
}
TRAINERS = [pytest.param(cls, id=cls.__name__) for cls in CASES]
# Its rows are token ids, which no picture can stand in.
WITH_ROWS = [case for case in TRAINERS if case.values[0] is not LightningOPDTrainer]


def build(cls, folder, **changes):
    config, arguments = CASES[cls]
    options = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"}
    arguments = {"model": small_model(), "processing_class": tiny_tokenizer(), "train_dataset": rl_rows(), **arguments}
    return cls(args=config(**options), **{**arguments, **changes})


def vision_model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"model_type": "llama", "vocab_size": len(tiny_tokenizer()), **sizes}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, **sizes}, text_config=text
    )
    return LlavaForConditionalGeneration(config)


SEEING = (BridgeTrainer, NaiveMixTrainer)


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_vision_language_model_with_a_tokenizer(tmp_path, cls):
    kind, message = NotImplementedError, f"{cls.__name__} does not support vision-.*vision_config.*text-only"
    if cls in SEEING:
        kind, message = (
            ValueError,
            f"vision_config.*is a tokenizer: {cls.__name__} needs the model's processor.*text-only",
        )
    with pytest.raises(kind, match=message):
        build(cls, tmp_path / "out", model=vision_model())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_processor(tmp_path, cls):
    class Processor(ProcessorMixin):
        def __init__(self):
            pass

    kind = ValueError if cls in SEEING else NotImplementedError
    with pytest.raises(kind, match="`processing_class` is a processor.*a tokenizer"):
        build(cls, tmp_path / "out", processing_class=Processor())


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("cls", WITH_ROWS)
def test_rows_with_pictures(tmp_path, cls, column):
    pictures = CASES[cls][1].get("train_dataset", rl_rows())
    pictures = pictures.add_column(column, [None] * len(pictures))
    with pytest.raises(NotImplementedError, match=f"`train_dataset` has a column `{column}`, but {cls.__name__}"):
        build(cls, tmp_path / "out", train_dataset=pictures)
    for rows in (pictures, {"one": rl_rows(), "two": pictures}, DatasetDict(one=pictures)):
        with pytest.raises(NotImplementedError, match=f"`eval_dataset` has a column `{column}`"):
            build(cls, tmp_path / "out", eval_dataset=rows)


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("cls", WITH_ROWS)
def test_messages_with_pictures(tmp_path, cls, kind):
    parts = [{"type": kind, "text": None}, {"type": "text", "text": "1+1="}]
    prompt = [{"role": "user", "content": parts}]
    rows = Dataset.from_list([{**row, "prompt": prompt} for row in CASES[cls][1].get("train_dataset", rl_rows())])
    with pytest.raises(NotImplementedError, match="`train_dataset` row 0 has messages with pictures"):
        build(cls, tmp_path / "out", train_dataset=rows)


@pytest.mark.parametrize("cls", [BridgeTrainer, NaiveMixTrainer, TwoStageTrainer])
def test_demonstrations_with_pictures(tmp_path, cls):
    rows = sft_rows().add_column("images", [[] for _ in range(len(sft_rows()))])
    with pytest.raises((NotImplementedError, ValueError), match="`sft_dataset` has .*`images`.*[Rr]emove"):
        build(cls, tmp_path / "out", sft_dataset=rows)
    assert not (tmp_path / "out").exists()


def test_a_model_by_its_path(tmp_path):
    vision_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`model` has a `vision_config`.*BridgeTrainer needs the model's processor"):
        build(BridgeTrainer, tmp_path / "out", model=str(tmp_path / "model"))
