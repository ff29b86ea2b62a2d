"""Group methods with tools: traces in which tools answer, rollouts beside them, guidance; the results are in no loss."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers import groups
from tests.helpers.group_losses import hpt_loss, luffy_loss, srft_loss, uft_loss, watch_buffer
from tests.helpers.groups import batches, replay_group
from tests.helpers.tools import (
    CALL_IDS,
    TOKENIZER,
    add,
    agent_trainer,
    assistant,
    external,
    texts,
    trace,
    turns_reward,
    user,
    with_calls,
)
from tests.helpers.training import PAIRS
from trl_bridge import (
    ActGuideTrainer,
    AdaPrefixTrainer,
    HPTTrainer,
    LUFFYTrainer,
    PrefixRFTTrainer,
    ReLIFTTrainer,
    SelfTeacherTrainer,
    SRFTTrainer,
    UFTTrainer,
)


TOLERANCE = 2e-4
SGD = {"optim": "sgd", "learning_rate": 0.1}


def expert_prompts(of=trace):
    return Dataset.from_list([{"prompt": [user(f"{a}+{b}=")], "expert": of(a, b)} for a, b in PAIRS])


def answer(a, b):
    return [assistant(f"{a + b}" + "!" * ((a + 2 * b) % 4))]


def build(folder, trainer_class, **changes):
    changes = {"train_dataset": expert_prompts(), **changes}
    if getattr(trainer_class.config_class, "reads_success_threshold", False):
        changes.setdefault("success_threshold", 100.0)
    return agent_trainer(folder, trainer_class, **changes)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The policy's own samples, of which some call the tool; traces are written over them."""
    sample = GRPOTrainer._generate_single_turn

    def generate(trainer, prompt_ids, *args, **kwargs):
        trainer.generation_config.max_new_tokens = 6
        return with_calls(prompt_ids, *sample(trainer, prompt_ids, *args, **kwargs))

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    return sample


def trained(folder, trainer_class, **changes):
    trainer = build(folder, groups.recording(trainer_class), **{**SGD, **changes})
    trainer.train()
    return trainer


def check_masks(trainer):
    """Every token is the policy's, the expert's or a tool's, and those of the expert are the turns of its traces."""
    seen = set()
    for batch in batches(trainer):
        own, expert = batch["tool_mask"].bool(), batch["expert_mask"].bool()
        there = batch["completion_mask"].bool()
        assert not (own & expert).any()
        trained = (own & there | expert).any(1, keepdim=True)  # HPT leaves whole rows out
        tools = there & ~own & ~expert & trained
        for row, text in enumerate(texts(batch, tools)):
            results = text.split("\n<|im_start|>tool\nsum ")
            assert results[0] == "" and all(part.split("<|im_end|>")[0].isdigit() for part in results[1:])
            assert all(part.endswith("<|im_end|>\n<|im_start|>assistant\n") for part in results[1:])
            seen.add((bool(expert[row].any()), bool(text)))
        for text in texts(batch, expert):
            assert not text or (text.startswith("<tool_call>") and "sum" not in text and text.count("<|im_end|>") == 2)
        assert not (batch["sft_mask"].bool() & ~expert).any()
    return seen


CASES = {
    "luffy": (LUFFYTrainer, {}, luffy_loss()),
    "luffy, dapo, kl": (LUFFYTrainer, {"loss_type": "dapo", "beta": 0.1, "temperature": 0.7}, luffy_loss()),
    "srft": (SRFTTrainer, {}, srft_loss()),
    "hpt": (HPTTrainer, {}, hpt_loss()),
}


@pytest.mark.parametrize("name", CASES)
def test_traces_of_several_turns(tmp_path, name):
    trainer_class, changes, loss = CASES[name]
    trainer = trained(tmp_path, trainer_class, **changes)
    seen = check_masks(trainer)
    assert (True, True) in seen and (trainer_class is HPTTrainer or (False, True) in seen)
    assert max(replay_group(trainer, loss)) < TOLERANCE


def test_a_traces_calls_are_not_made_again_and_its_turns_are_graded(tmp_path):
    made, graded = [], []

    def counted(a: int, b: int) -> str:
        """
        Adds.

        Args:
            a: A number.
            b: Another one.

        Returns:
            The sum.
        """
        made.append((a, b))
        return add(a, b)

    counted.__name__ = "add"

    def seen(completions, **kwargs):
        graded.extend(completions)
        return turns_reward(completions)

    trainer = build(tmp_path, LUFFYTrainer, tools=[counted], reward_funcs=seen, max_steps=1)
    trainer.train()
    assert made and set(made) == {(1, 2)}  # the rollouts' calls alone
    experts = [
        m for m in graded if len(m) == 3 and m[1]["content"] == add(**m[0]["tool_calls"][0]["function"]["arguments"])
    ]
    assert len([m for m in experts if m[2]["content"].rstrip("!").isdigit()]) >= 4


def test_relift_trains_on_the_turns_alone(tmp_path):
    trainer = build(tmp_path, watch_buffer(), buffer_size=2, max_steps=2, **SGD)
    seen = []
    score = trainer.score_rows
    trainer.score_rows = lambda model, batch, **head: seen.append(batch) or score(model, batch, **head)
    trainer.train()
    assert trainer.sft_steps == 2
    labelled = [
        TOKENIZER.decode([token for token in row if token != -100])
        for batch in seen
        for row in batch["labels"].tolist()
    ]
    assert labelled and all(text.count("<tool_call>") == 1 and "sum" not in text for text in labelled if text)


@pytest.mark.parametrize("trainer_class", [PrefixRFTTrainer, UFTTrainer, AdaPrefixTrainer])
def test_prefixes_inside_a_tools_result_are_refused(tmp_path, trainer_class):
    with pytest.raises(NotImplementedError, match="`train_dataset` row 0: a tool answers in `expert`.*tool's result"):
        build(tmp_path, trainer_class)


@pytest.mark.parametrize("trainer_class", [PrefixRFTTrainer, UFTTrainer, AdaPrefixTrainer])
def test_prefixes_of_one_turn_beside_tools(tmp_path, trainer_class):
    trainer = trained(tmp_path, trainer_class, train_dataset=expert_prompts(answer), max_steps=2)
    for batch in batches(trainer):
        tools = external(batch) & (batch["expert_mask"] == 0)
        assert all(not text or text.startswith("\n<|im_start|>tool\nsum 3") for text in texts(batch, tools))
    assert any(external(batch).any() for batch in batches(trainer))
    if trainer_class is UFTTrainer:
        assert max(replay_group(trainer, uft_loss, hint_coef=trainer.args.hint_coef)) < TOLERANCE


class Environment:
    def reset(self, **kwargs):
        pass

    def look(self) -> str:
        """
        Looks.

        Returns:
            What is there.
        """
        return "nothing"


@pytest.mark.parametrize("trainer_class", [LUFFYTrainer, HPTTrainer, ReLIFTTrainer, ActGuideTrainer])
def test_environments_are_refused(tmp_path, trainer_class):
    with pytest.raises(NotImplementedError, match="`environment_factory`.*has not seen what an expert has written"):
        build(tmp_path, trainer_class, environment_factory=Environment)


def test_the_self_teacher_refuses_tools(tmp_path):
    with pytest.raises(NotImplementedError, match="`tools` is not supported by SelfTeacherTrainer"):
        build(tmp_path, SelfTeacherTrainer)


# Guidance inside a tool loop


def only_where_told(sample):
    """The policy calls the tool where the prompt says how, and answers at random elsewhere."""

    def generate(trainer, prompt_ids, *args, **kwargs):
        trainer.generation_config.max_new_tokens = 3
        ids, log_probs = sample(trainer, prompt_ids, *args, **kwargs)
        for row, prompt in enumerate(prompt_ids):
            text = TOKENIZER.decode(prompt)
            if "call add" in text and "<|im_start|>tool" not in text:
                ids[row] = list(CALL_IDS)
            elif "<|im_start|>tool" in text and row % 2 == 0:
                ids[row] = [*TOKENIZER("3")["input_ids"], TOKENIZER.eos_token_id]
        return ids, log_probs

    return generate


def solved(completions, **kwargs):
    return [float(len(m) == 3 and m[1]["role"] == "tool" and m[-1]["content"] == "3") for m in completions]


def test_actguide_guides_inside_the_tool_loop(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", only_where_told(calls))
    steps = ["First call add. ", "Then say what it says. ", "The sum is 3."]
    rows = [{"prompt": [user(f"{n}?")], "expert": "".join(steps), "expert_steps": steps} for n in range(16)]
    trainer = agent_trainer(
        tmp_path,
        groups.recording(ActGuideTrainer),
        train_dataset=Dataset.from_list(rows),
        reward_funcs=solved,
        beta=0.0,
        max_steps=2,
        **SGD,
    )
    trainer.train()
    assert [entry["actguide/guided_rate"] for entry in trainer.logged if "loss" in entry] == [1.0, 1.0]
    assert [entry["actguide/steps"] for entry in trainer.logged if "loss" in entry] == [1.0, 1.0]
    for batch in batches(trainer):
        assert batch["guided"].all()
        # Trained under the prompt without guidance; the tool's tokens are there, and in no loss.
        assert not any("call add" in TOKENIZER.decode(ids) for ids in batch["prompt_ids"])
        assert set(texts(batch, external(batch))) == {"\n<|im_start|>tool\nsum 3<|im_end|>\n<|im_start|>assistant\n"}
        assert batch["advantages"].any()

    def loss(p):
        rows = p.batch["guided"].unsqueeze(1)
        old = torch.where(rows, p.batch["guided_per_token_logps"].double(), p.old)
        p.old = old
        advantages, mask = p.advantages.unsqueeze(1), (p.batch["completion_mask"] * p.batch["tool_mask"]).double()
        ratio = (p.log_p - old).exp()
        clipped = ratio.clamp(1 - p.o["eps_low"], 1 + p.o["eps_high"])
        per_token = -torch.minimum(ratio.clamp(max=trainer.args.delta) * advantages, clipped * advantages)
        return groups.token_sum(per_token, mask, p.batch, p.o, p.window)

    assert max(replay_group(trainer, loss)) < TOLERANCE
