import re

import pytest

from tests.helpers.training import small_trainer
from tests.helpers.two_stage import two_stage
from trl_bridge import BridgeConfig, __version__, cli
from trl_bridge.cli import train
from trl_bridge.training.card import changed_options, last_figures, shown_command


def cells(card, head):
    """A table of the card, from its first column to its second."""
    text = card.split(f"| {head} | value |\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE))


def test_the_card_of_a_run(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=1, bridge_lambda=0.25)
    trainer.train()
    trainer.card_lines = ["Command: `mine`"]
    trainer.create_model_card()
    trainer.create_model_card()  # again, as a push does
    card = (tmp_path / "README.md").read_text()
    assert card.count("## How it was trained") == 1
    assert f"- Method: BRIDGE, by trl-bridge {__version__}\n- Command: `mine`\n- `train_dataset`: " in card
    assert f"- `sft_dataset`: {len(trainer._sft_dataset)} rows\n- Processes: 1\n" in card
    options, figures = cells(card, "option"), cells(card, "metric")
    assert options["preset"] == "`paper`" and options["bridge_lambda"] == "`0.25`" and options["max_steps"] == "`1`"
    assert not {"output_dir", "epsilon", "hub_token"} & set(options)
    logged = trainer.state.log_history
    assert "at update 1:" in card
    for name in ("reward", "bridge/gain", "sft/loss"):
        (value,) = [entry[name] for entry in logged if name in entry]
        assert float(figures[name]) == pytest.approx(value, rel=1e-3)
    assert str(tmp_path) not in card


def test_a_cold_start_has_its_card_at_the_top(tmp_path):
    trainer = two_stage(tmp_path, sft_max_steps=1, max_steps=1)
    trainer.card_lines = ["Command: `mine`"]
    trainer.train()
    trainer.save_state()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- Method: a cold start (SFT, then GRPO), by trl-bridge" in card and "- Command: `mine`" in card
    assert (tmp_path / "trainer_state.json").is_file()


def test_nothing_secret_is_shown(tmp_path):
    config = BridgeConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        hub_token="hf_secret",
        hub_model_id="someone/else",
        model_init_kwargs={"token": "hf_secret"},
        vllm_server_base_url="http://user:pass@inside",
    )
    shown = changed_options(config)
    assert dict(shown)["bf16"] is False
    assert not any(word in str(shown) for word in ("secret", "someone", "inside", str(tmp_path)))


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["--max_steps", "3"], "--max_steps 3"),
        (["--system_prompt", "two words"], "--system_prompt 'two words'"),
        (["--hub_token", "hf_x", "--max_steps", "3"], "--hub_token ... --max_steps 3"),
        (["--hub_token=hf_x", "--max_steps=3"], "--hub_token=... --max_steps=3"),
        (["--model_init_kwargs", '{"token": "hf_x"}'], "--model_init_kwargs ..."),
        (["--push_to_hub_token", "--bf16", "false"], "--push_to_hub_token --bf16 false"),
    ],
)
def test_a_command_without_its_secrets(tokens, shown):
    assert shown_command("trl-bridge bridge", tokens) == f"trl-bridge bridge {shown}"


def test_figures_are_the_last_ones_logged():
    log = [
        {"reward": 0.1, "sft/loss": 2.0},
        {"reward": 0.2, "clip_ratio/low_mean": 0.0, "step": 2},
        {"eval_reward": 0.5, "epoch": 1.0, "sft/loss": None},
    ]
    assert last_figures(log) == {"reward": 0.2, "sft/loss": 2.0, "eval_reward": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bridge", "sft"])
def test_the_command_leaves_card_and_log(tmp_path, capsys, method):
    train.run(
        method,
        ["--config", f"smoke/{method}", "--output_dir", str(tmp_path), "--max_steps", "1", "--save_strategy", "no"],
    )
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "trainer_state.json").is_file()
    if method == "bridge":
        assert (
            f"- Command: `trl-bridge bridge --config smoke/bridge --output_dir {tmp_path} --max_steps 1 --save_strategy no`"
            in card
        )
        assert "- `dataset_name`: `builtin:addition`" in card and "closeness_reward" in card
        assert cli.main(["plot", str(tmp_path)]) == 0
        drawn = {path.name for path in tmp_path.glob("*.png")}  # nothing is weighted
        assert drawn == {"reward.png", "gain.png", "efficiency.png"}
