"""The clock of a chat template stands still for a whole run."""

import datetime
import json

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from tests.helpers.resume import StopAt
from tests.helpers.training import digits_reward, small_config, small_lora
from tests.helpers.two_stage import SAVING, STEPS, Cut
from trl_bridge import BridgeTrainer, LUFFYTrainer
from trl_bridge.cli.data import main as data
from trl_bridge.cli.evaluate import main as evaluate
from trl_bridge.generation import day as days
from trl_bridge.generation import engines
from trl_bridge.generation.day import clock_template, stopped, template_kwargs
from trl_bridge.methods.luffy import LUFFYConfig
from trl_bridge.methods.two_stage import TwoStageConfig, TwoStageTrainer
from trl_bridge.models import tiny_model, tiny_tokenizer


LLAMA = (
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n        {%- set date_string = strftime_now('%d %b %Y') %}\n"
    "    {%- else %}\n        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
)
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
QUESTION = [{"role": "user", "content": "1+1"}]


def dated_tokenizer(template=LLAMA + "{{ date_string }}\n" + TURNS):
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.chat_template = template
    return tokenizer


def chat_model():
    return tiny_model(dated_tokenizer(), hidden_size=32, layers=2, seed=3)


def text_of(ids):
    return dated_tokenizer().decode(ids).replace(" ", "")


def rendered(template, **kwargs):
    return dated_tokenizer().apply_chat_template(QUESTION, chat_template=template, tokenize=False, **kwargs)


@pytest.mark.parametrize(
    "template",
    [
        LLAMA + "{{ date_string }}\n" + TURNS,
        "   {% if messages %}[{{ strftime_now('%A %-d %B %Y, %j, %y/%m/%d') }}]{% endif %}\n" + TURNS,
        "\n\n{%- macro head() %}{{ strftime_now(format='%Y-%m-%d') }}{% endmacro %}\n{% for m in messages %}{{ head() }}"
        "{{ m.content }}{% endfor %}",
        "{% set ns = namespace(d='') %}{% for m in messages %}{% set ns.d = strftime_now(form) %}{% endfor %}{{ ns.d }}",
    ],
)
def test_a_stopped_clock_prints_what_a_running_one_does(template):
    now = datetime.date.today().isoformat()
    assert rendered(stopped(template, now), form="%d.%m.") == rendered(template, form="%d.%m.")
    assert rendered(stopped(template, "1999-02-03"), form="%d.%m.") != rendered(template, form="%d.%m.")


def test_variables_win_and_templates_without_a_clock_are_left_alone():
    tokenizer = dated_tokenizer()
    kwargs = template_kwargs(tokenizer, "2024-02-01", {"date_string": "1 May 1886"})
    assert "1 May 1886" in tokenizer.apply_chat_template(QUESTION, tokenize=False, **kwargs)
    assert template_kwargs(tiny_tokenizer(chat_template=True), "2024-02-01", {"a": 1}) == {"a": 1}
    assert clock_template(tiny_tokenizer()) is None


def rows(column):
    prompts = [[{"role": "user", "content": f"{a}+{b}="}] for a in range(4) for b in range(4)]
    answers = [[{"role": "assistant", "content": str(a + b)}] for a in range(4) for b in range(4)]
    return Dataset.from_dict({"prompt": prompts, column: answers})


class Prompts(TrainerCallback):
    """What the policy was asked, as tokens."""

    def __init__(self):
        self.seen = []

    def watch(self, trainer):
        generate = trainer._generate_single_turn

        def watched(prompt_ids, *args, **kwargs):
            self.seen.append([list(ids) for ids in prompt_ids])
            return generate(prompt_ids, *args, **kwargs)

        trainer._generate_single_turn = watched


def bridge(folder, **changes):
    return BridgeTrainer(
        chat_model(),
        lambda completions, **kwargs: digits_reward([c[0]["content"] for c in completions]),
        small_config(folder, max_steps=4, save_strategy="steps", save_steps=2, **changes),
        rows("completion"),
        rows("completion"),
        processing_class=dated_tokenizer(),
        peft_config=small_lora(),
    )


def luffy(folder, **changes):
    return LUFFYTrainer(
        chat_model(),
        lambda completions, **kwargs: digits_reward([c[0]["content"] for c in completions]),
        small_config(folder, LUFFYConfig, max_steps=4, save_strategy="steps", save_steps=2, **changes),
        rows("expert"),
        processing_class=dated_tokenizer(),
    )


@pytest.mark.parametrize("make", [bridge, luffy])
def test_a_run_over_midnight_and_its_resume_keep_the_first_day(make, tmp_path, monkeypatch):
    """Prompts, demonstrations and experts of the whole run, and of what resumes it, print the day of its first start."""
    clock = ["2030-01-31"]
    monkeypatch.setattr("trl_bridge.training.checkpoint.resume.today", lambda: clock[0])
    whole = make(tmp_path / "whole")
    watched = Prompts()
    watched.watch(whole)
    whole.train()
    half = make(tmp_path / "half")
    half.add_callback(StopAt(2))
    half.train()
    clock[0] = "2030-02-01"
    resumed = make(tmp_path / "half")
    assert resumed.template_day == "2030-02-01"
    again = Prompts()
    again.watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.template_day == "2030-01-31"
    said = {text_of(ids) for batch in again.seen for ids in batch}
    assert said and all("31Jan2030" in text for text in said)
    assert again.seen == watched.seen[-len(again.seen) :]
    if make is bridge:
        ids = resumed.demonstrations.rendered[0]["input_ids"]
        assert "31Jan2030" in text_of(ids)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_day_is_said_and_variables_win_in_training(tmp_path, caplog):
    trainer = bridge(tmp_path)
    assert trainer.template_day == days.today()
    assert f"it stays {days.today()} for the whole run" in caplog.text
    own = bridge(tmp_path, chat_template_kwargs={"date_string": "1 May 1886"})
    assert "1May1886" in text_of(own.demonstrations.rendered[0]["input_ids"])


def test_an_evaluation_that_grows_keeps_its_first_day(tmp_path, monkeypatch):
    clock = ["2030-01-31"]
    monkeypatch.setattr("trl_bridge.generation.day.today", lambda: clock[0])
    dated_tokenizer().save_pretrained(tmp_path / "model")
    chat_model().save_pretrained(tmp_path / "model")
    asked = [{"prompt": QUESTION, "solution": "2"}, {"prompt": [{"role": "user", "content": "2+2"}], "solution": "4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    prompts = []

    def watched(model, tokenizer, ids, *args, **kwargs):
        prompts.extend(text_of(each) for each in ids)
        return draw(model, tokenizer, ids, *args, **kwargs)

    draw = engines.generate_batch
    monkeypatch.setattr(engines, "generate_batch", watched)
    line = [f"--model={tmp_path}/model", f"--benchmarks={tmp_path}/rows.jsonl", f"--output_dir={tmp_path}/results"]
    line += ["--max_new_tokens=4", "--temperature=1"]
    assert evaluate([*line, "--n=1"]) == 0
    clock[0] = "2030-02-01"
    assert evaluate([*line, "--n=2"]) == 0
    assert len(prompts) == 4 and all("31Jan2030" in prompt for prompt in prompts)


def test_both_stages_of_a_cold_start_keep_its_first_day(tmp_path, monkeypatch):
    clock = ["2030-01-31"]
    for place in ("trl_bridge.methods.two_stage.today", "trl_bridge.training.checkpoint.resume.today"):
        monkeypatch.setattr(place, lambda: clock[0])
    dated_tokenizer().save_pretrained(tmp_path / "model")
    chat_model().save_pretrained(tmp_path / "model")
    said = []

    def make(**changes):
        return TwoStageTrainer(
            str(tmp_path / "model"),
            lambda completions, **kwargs: digits_reward([c[0]["content"] for c in completions]),
            small_config(tmp_path / "run", TwoStageConfig, max_steps=2, **STEPS, **SAVING),
            rows("completion"),
            rows("completion"),
            **changes,
        )

    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[Cut("sft", 2, "save")]).train()
    clock[0] = "2030-02-01"
    resumed = make(callbacks=[Cut("grpo", 1, "save")])
    monkeypatch.setattr(
        "trl_bridge.methods.two_stage._ColdStart.train",
        lambda self, **kwargs: (
            said.extend(text_of(ids) for ids in self.train_dataset["input_ids"]),
            super(type(self), self).train(**kwargs),
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=True)
    assert said and all("31Jan2030" in text for text in said)
    assert resumed.trainer.template_day == "2030-01-31"
    clock[0] = "2030-02-02"
    last = make()
    last.train(resume_from_checkpoint=True)
    assert last.trainer.template_day == "2030-01-31"


def test_scored_rollouts_are_sampled_on_one_day(tmp_path, monkeypatch):
    clock = ["2030-01-31"]
    monkeypatch.setattr("trl_bridge.generation.day.today", lambda: clock[0])
    for name in ("student", "teacher"):
        dated_tokenizer().save_pretrained(tmp_path / name)
        chat_model().save_pretrained(tmp_path / name)
    rows("completion").select(range(4)).to_json(tmp_path / "rows.jsonl")
    line = ["score-rollouts", f"{tmp_path}/rows.jsonl", f"--model={tmp_path}/student", f"--teacher={tmp_path}/teacher"]
    line += [f"--sft_teacher={tmp_path}/teacher", f"--output_dir={tmp_path}/out", "--max_new_tokens=4"]
    assert data([*line, "--format=jsonl"]) == 0
    clock[0] = "2030-02-01"
    assert data([*line, "--format=jsonl"]) == 0  # the rollouts are taken up, not refused
    written = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert written and all("31Jan2030" in text_of(row["prompt_ids"]) for row in written)
