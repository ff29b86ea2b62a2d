"""Rows that a trainer cannot train on are refused before training, and transforms of datasets are honoured."""

import pytest
from datasets import Dataset

from tests.helpers.distillation import distillation_trainer
from tests.helpers.training import digits_reward, rl_rows, sft_rows, small_config, small_model, small_trainer
from tests.helpers.two_stage import two_stage
from trl_bridge import BridgeTrainer, LUFFYTrainer, OPDTrainer
from trl_bridge.methods.luffy import LUFFYConfig
from trl_bridge.models import tiny_tokenizer


def exclaimed(batch):
    """As TRL's own remedy for filled-in nulls: a transform that changes what the rows hold."""
    return {**batch, "prompt": [f"{prompt}!" for prompt in batch["prompt"]]}


def test_a_transform_is_honoured_by_both_streams(tmp_path):
    rows = sft_rows().with_transform(exclaimed)
    trainer = small_trainer(tmp_path, sft_dataset=rows, train_dataset=rows, sft_pairing="prompt", max_steps=1)
    asked = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *args: (asked.extend(map(tuple, ids)), generate(ids, *args))[1]
    trainer.train()
    taught = [row for row in trainer.demonstrations.rendered if row["input_ids"]]
    prompts = {tuple(i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label == -100) for r in taught}
    assert asked and set(asked) <= prompts
    assert all(trainer.processing_class.decode(ids).endswith("!") for ids in asked)


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_a_format_of_demonstrations_changes_nothing(kind, tmp_path):
    plain = small_trainer(tmp_path, max_steps=1)
    shaped = small_trainer(tmp_path, max_steps=1, sft_dataset=sft_rows().with_format(kind))
    assert shaped.demonstrations.fingerprint == plain.demonstrations.fingerprint


def test_a_transform_may_make_the_columns(tmp_path):
    raw = Dataset.from_dict({"q": ["1+1=", "1+2="], "a": ["2", "3"]})
    rows = raw.with_transform(lambda batch: {"prompt": batch["q"], "completion": batch["a"]})
    assert len(small_trainer(tmp_path, sft_dataset=rows).demonstrations.rendered) == 2


def spoken(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (Dataset.from_dict({"question": ["1"] * 9}), "`train_dataset` has no column `prompt`; name it with"),
        (Dataset.from_dict({"prompt": ["1", None, "3"] * 4}), "`train_dataset` row 1: `prompt` is null"),
        (Dataset.from_dict({"prompt": ["1", "2", " "] * 4}), "`train_dataset` row 2: `prompt` is empty"),
        (
            Dataset.from_dict({"prompt": [spoken("1"), spoken(None)] * 4}),
            "row 1: a message of `prompt` has no `content`",
        ),
        (Dataset.from_dict({"prompt": [spoken("1"), []] * 4}), "row 1: `prompt` is empty"),
        (
            Dataset.from_dict({"prompt": ["1+1=", spoken("1")] * 4}, on_mixed_types="use_json"),
            "row 1: `prompt` is messages, and that of row 0 is a string",
        ),
        (rl_rows().with_format("numpy"), "has the format 'numpy'"),
        (rl_rows().select(range(3)), "`train_dataset` has 3 rows .* takes 4 prompts"),
    ],
)
def test_rl_rows_that_cannot_be_asked(rows, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        small_trainer(tmp_path, train_dataset=rows)
    with pytest.raises(ValueError, match=said):
        LUFFYTrainer(
            small_model(),
            digits_reward,
            small_config(tmp_path, LUFFYConfig),
            rows if "expert" in rows.column_names else rows.add_column("expert", ["2"] * len(rows)),
            processing_class=tiny_tokenizer(),
        )


def test_held_out_rows_are_looked_through_too(tmp_path):
    rows = Dataset.from_dict({"prompt": ["1", None]})
    with pytest.raises(ValueError, match="`eval_dataset` row 1: `prompt` is null"):
        small_trainer(tmp_path, eval_dataset=rows)
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` row 1"):
        small_trainer(tmp_path, eval_dataset={"a": rl_rows(), "b": rows})


def test_cold_starts_and_distillation_look_before_they_start(tmp_path, monkeypatch):
    nulls = Dataset.from_dict({"prompt": ["1", None], "completion": ["1", "2"]})
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="`sft_dataset` row 1: `prompt` is null"):
        patched.setattr("tests.helpers.two_stage.sft_rows", lambda: nulls)
        two_stage(tmp_path)
    monkeypatch.setattr("tests.helpers.two_stage.rl_rows", lambda: rl_rows().select(range(3)))
    with pytest.raises(ValueError, match="has 3 rows .* takes 4 prompts"):
        two_stage(tmp_path)
    with pytest.raises(ValueError, match="has 3 rows .* prompts: no update would be made"):
        distillation_trainer(tmp_path, OPDTrainer, train_dataset=rl_rows().select(range(3)))


def test_chat_prompts_beside_bare_demonstrations_are_said(tmp_path, caplog):
    rows = Dataset.from_dict({"prompt": [spoken("1+1=")] * 8})
    chat = tiny_tokenizer(chat_template=True)
    BridgeTrainer(
        small_model(),
        digits_reward,
        small_config(tmp_path),
        rows,
        sft_rows(),
        processing_class=chat,
    )
    assert "bare strings" in caplog.text
