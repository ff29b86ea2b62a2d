import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers.contract import place_of, source_of
from tests.helpers.group_losses import guide_loss, watch_guidance
from tests.helpers.groups import (
    Engine,
    batches,
    group_config,
    group_trainer,
    hint_rows,
    replay_group,
)
from tests.helpers.training import digits_reward, movement_error, small_config, small_lora, small_model
from trl_bridge import ActGuideConfig, ActGuideTrainer
from trl_bridge.methods.actguide_rollouts import GuidanceSearch, guided_prompt
from trl_bridge.models import tiny_model, tiny_tokenizer
from trl_bridge.selftest.reference import objectives


TOKENIZER = tiny_tokenizer()
STEPS = {row["prompt"]: row["expert_steps"] for row in hint_rows(steps=True)}


def guide_trainer(folder, trainer_class=ActGuideTrainer, **changes):
    changes.setdefault("train_dataset", hint_rows(steps=True))
    return group_trainer(folder, trainer_class, **{"hard_threshold": 1.0, "expert_max_length": 20, **changes})


def errors_of(trainer, **changes):
    options = {"delta": trainer.args.delta, "gamma": trainer.args.shaping_gamma, **changes}
    return replay_group(trainer, guide_loss(trainer), **options)


def taught_rows(trainer):
    """Guided rows with an advantage."""
    return sum(
        int(((batch["advantages"] != 0) & batch["guided"]).sum()) for batch in batches(trainer) if "guided" in batch
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "beta": 0.0},
        {
            "loss_type": "dr_grpo",
            "temperature": 0.7,
            "beta": 0.1,
            "scale_rewards": "none",
            "optim": "sgd",
            "learning_rate": 0.5,
        },
        {"loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4, "temperature": 1.3, "max_steps": 4},
        # With seed 11 a gradient is so near to zero that AdamW steps from its rounding.
        {"shaping_gamma": 0.1, "num_iterations": 2, "max_steps": 4, "epsilon": 0.05, "seed": 5},
        {"shaping_gamma": 0.5, "beta": 0.0, "optim": "sgd", "learning_rate": 0.1},
    ],
)
def test_update_equals_the_reference(tmp_path, changes):
    trainer = guide_trainer(tmp_path, watch_guidance(), **changes)
    trainer.train()
    assert taught_rows(trainer) >= 4
    assert any(not batch.get("guided", torch.zeros(1)).bool().all() for batch in batches(trainer))
    assert max(errors_of(trainer)) < 2e-4


def test_the_reference_can_tell_the_ratio(tmp_path):
    trainer = guide_trainer(tmp_path, watch_guidance())
    trainer.train()
    for batch in batches(trainer):
        if "guided_prompt_ids" in batch:  # as if the rollouts had been sampled without guidance
            batch["guided_prompt_ids"], batch["guided_prompt_mask"] = batch["prompt_ids"], batch["prompt_mask"]
    assert max(errors_of(trainer)) > 1e-2


# The search


@pytest.mark.parametrize("rounds", [1, 2, 5, 7])
def test_the_search_against_an_oracle(rounds):
    for longest in range(1, 65):
        for least in range(1, longest + 2):  # the last one: nothing works
            search, tried = GuidanceSearch(longest, rounds), []
            while (probe := search.probe) is not None:
                assert 1 <= probe <= longest and probe not in tried
                tried.append(probe)
                search.tell(probe >= least)
            assert len(tried) <= rounds
            if least > longest:
                assert search.found is None and longest in tried
            else:
                assert search.found in tried and search.found >= least
                if longest < 2**rounds:
                    assert search.found == least
            with pytest.raises(ValueError, match="over"):
                search.tell(True)


def shown_steps(text):
    """Question and number of steps shown in a prompt."""
    if "Reference steps:" not in text:
        return text, 0
    shown, question = text.removeprefix("Reference steps:\n").rsplit("\n\n", 1)
    counts = [k for k in range(len(STEPS[question]) + 1) if "".join(STEPS[question][:k]) == shown]
    return question, counts[0]


@pytest.fixture
def scripted(monkeypatch):
    """Sampler whose every other rollout of a prompt is right where it has been shown enough steps."""
    calls = []

    def install(needed, log_probs=False):
        def generate(trainer, prompt_ids, images, fields, num_generations, has_tool_images=False):
            prompts = [shown_steps(TOKENIZER.decode(ids)) for ids in prompt_ids]
            calls.append((prompts, num_generations))
            texts = [
                "9" if shown >= needed[question] and place % 2 == 0 else "1x"
                for place, (question, shown) in enumerate(prompts)
            ]
            ids = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] for text in texts]
            return ids, ([[-1.0] * len(row) for row in ids] if log_probs else None)

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
        return calls

    return install


def nine_reward(asked):
    def reward(prompts, completions, log_extra, log_metric, **kwargs):
        asked.append(list(zip(prompts, completions, strict=True)))
        log_extra("seen", list(completions))
        log_metric("calls", 1.0)
        return [float("9" in text) for text in completions]

    return reward


def test_the_search_on_scripted_rollouts(tmp_path, scripted):
    # Steps that may be shown: all but the last, of 4 to 7.
    needed = {q: [0, 1, 3, 99][index % 4] for index, q in enumerate(STEPS)}
    calls, asked = scripted(needed), []
    trainer = guide_trainer(
        tmp_path,
        watch_guidance(),
        hard_threshold=0.0,
        reward_funcs=nine_reward(asked),
        max_steps=1,
        shuffle_dataset=False,
        beta=0.0,
    )
    trainer.train()
    (first, size), *probes, (final, last_size) = calls
    questions = list(dict.fromkeys(question for question, _ in first))
    assert len(questions) == 4 and size == last_size == 4 and all(shown == 0 for _, shown in first)
    hard = [q for q in questions if needed[q] > 0]
    assert len(hard) == 3
    # Each probe of two rows shows the middle of what is left.
    searches = {q: GuidanceSearch(len(STEPS[q]) - 1, 5) for q in hard}
    for prompts, count in probes:
        assert count == 2
        want = [(q, s.probe) for q, s in searches.items() if s.probe is not None]
        assert prompts == [pair for pair in want for _ in range(2)]
        for q, _ in want:
            searches[q].tell(searches[q].probe >= needed[q])
    assert all(s.probe is None for s in searches.values())
    solved = [q for q in hard if needed[q] < 99]
    assert final == [(q, needed[q]) for q in solved for _ in range(4)]
    # Rewards: the batch, the probes, and the new rollouts, each row once.
    assert [len(rows) for rows in asked] == [16, *(len(prompts) for prompts, _ in probes), 8]
    assert sorted(asked[-1]) == sorted((q, text) for q in solved for text in ("9", "1x") for _ in range(2))
    # Trained under the prompt without guidance, with advantages of the new rollouts.
    rows = []
    for batch in batches(trainer):
        for row in range(8):
            question = TOKENIZER.decode(batch["prompt_ids"][row][batch["prompt_mask"][row] > 0])
            text = TOKENIZER.decode(batch["completion_ids"][row], skip_special_tokens=True)
            assert bool(batch["guided"][row]) == (question in solved)
            rows.append((question, text, float(batch["advantages"][row])))
    deviation = math.sqrt(4 / 3 * 0.25) + 1e-4
    for question, text, advantage in rows:
        learned = question not in hard or question in solved
        assert advantage == pytest.approx((0.5 if text == "9" else -0.5) / deviation if learned else 0.0)
    log = trainer.logged[0]
    spent = [needed[q] for q in solved]
    share = sum(needed[q] / (len(STEPS[q]) - 1) for q in solved) / 2
    assert log["actguide/hard_rate"] == 0.75 and log["actguide/guided_rate"] == 0.5
    assert log["actguide/steps"] == sum(spent) / 2 and log["actguide/step_share"] == pytest.approx(share)
    assert log["actguide/probe_rollouts"] == sum(len(prompts) for prompts, _ in probes)
    assert log["actguide/rescued_rate"] == 1.0 and log["actguide/mention_rate"] == 0.0
    assert log["rollouts/reward"] == 0.125 and log["expert/reward"] == 0.5 and log["reward"] == 0.375
    # The table of completions shows what is trained, and its columns belong to that; metrics count one call.
    assert list(trainer._logs["completion"]) == list(trainer._logs["extra"]["seen"])
    assert log["calls"] == 1.0


def test_what_no_guidance_solves_is_left_as_it_was(tmp_path, scripted):
    calls, asked = scripted(dict.fromkeys(STEPS, 99)), []
    trainer = guide_trainer(
        tmp_path, watch_guidance(), hard_threshold=0.0, reward_funcs=nine_reward(asked), max_steps=1, probe_rounds=2
    )
    trainer.train()
    assert [count for _, count in calls] == [4, 2, 2]
    # The last probe is of all that may be shown.
    assert all(shown == len(STEPS[q]) - 1 for q, shown in calls[-1][0])
    assert not any("guided" in batch for batch in batches(trainer))
    assert trainer.logged[0]["actguide/guided_rate"] == 0.0 and trainer.logged[0]["actguide/hard_rate"] == 1.0
    assert "expert/reward" not in trainer.logged[0]


def test_all_steps_are_shown_if_asked_for(tmp_path, scripted):
    calls = scripted({q: len(steps) for q, steps in STEPS.items()})
    options = {"hard_threshold": 0.0, "reward_funcs": nine_reward([]), "max_steps": 1}
    guide_trainer(tmp_path, show_last_step=True, **options).train()
    assert all(shown == len(STEPS[q]) for q, shown in calls[-1][0]) and calls[-1][1] == 4
    calls.clear()
    guide_trainer(tmp_path, **options).train()
    assert all(count == 2 for _, count in calls[1:])


def test_prompts_without_solution_and_unscored_groups_get_none(tmp_path, scripted):
    calls = scripted(dict.fromkeys(STEPS, 1))
    options = {"hard_threshold": 0.0, "max_steps": 2, "train_dataset": hint_rows(every=2, steps=True)}
    trainer = guide_trainer(tmp_path, reward_funcs=nine_reward([]), **options)
    trainer.train()
    have = {row["prompt"] for row in options["train_dataset"] if row["expert"]}
    guided = {question for prompts, _ in calls for question, shown in prompts if shown}
    assert guided and guided <= have
    calls.clear()
    guide_trainer(tmp_path, reward_funcs=lambda completions, **kwargs: [None] * len(completions), **options).train()
    assert all(count == 4 for _, count in calls)


def test_conversations(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=True)
    asked, sent = [], []

    def reward(prompts, completions, **kwargs):
        asked.append((prompts, completions))
        return digits_reward([message["content"] for (message,) in completions])

    class Watched(ActGuideTrainer):
        def sample_apart(self, prompt_ids, count):
            sent.extend(tokenizer.decode(ids) for ids in prompt_ids)
            return super().sample_apart(prompt_ids, count)

    rows = hint_rows(steps=True).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = Watched(
        model=tiny_model(tokenizer, hidden_size=32, layers=2),
        reward_funcs=reward,
        args=group_config(tmp_path, ActGuideConfig, hard_threshold=1.0, expert_max_length=40, max_steps=2),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert max(log["actguide/guided_rate"] for log in trainer.state.log_history if "loss" in log) > 0
    start = "<|im_start|>user\nReference steps:\n"
    guided = [text for text in sent if "Reference" in text]
    assert guided and all(text.startswith(start) and text.endswith("<|im_start|>assistant\n") for text in guided)
    for text in guided:
        shown, question = text.removeprefix(start).split("<|im_end|>")[0].rsplit("\n\n", 1)
        assert shown in {"".join(STEPS[question][:k]) for k in range(1, len(STEPS[question]))}
    # Reward functions see the dataset's prompts, and messages.
    for prompts, completions in asked:
        assert all(prompt[0]["content"] in STEPS for prompt in prompts)
        assert all(messages[0]["role"] == "assistant" for messages in completions)


def test_guided_prompts():
    template = "{steps} | {prompt}"
    assert guided_prompt("1+1=", "{prompt}", template) == "{prompt} | 1+1="
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    assert guided_prompt(talk, "x", template) == [talk[0], {"role": "user", "content": "x | q"}, talk[2]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert guided_prompt(parts, "x", template)[0]["content"] == "x | q"
    with pytest.raises(ValueError, match="no user message"):
        guided_prompt(talk[:1], "x", template)


# Limits


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "num_iterations": 2}, {"expert_probability": 0.0}])
def test_without_a_hard_group_it_is_grpo_to_the_bit(tmp_path, changes):
    shared = {"loss_type": "dapo", "beta": 0.0, "delta": 3.0, **changes}
    asked = []

    def reward(completions, **kwargs):
        asked.append(len(completions))
        return digits_reward(completions)

    reward.__name__ = digits_reward.__name__
    threshold = 1.0 if "expert_probability" in changes else -1.0
    ours = guide_trainer(tmp_path, hard_threshold=threshold, reward_funcs=reward, padding_free=False, **shared)
    ours.train()
    assert set(asked) == {16} and len(asked) == 3 - ("num_iterations" in changes)
    shared.pop("expert_probability", None)
    grpo = group_trainer(tmp_path, GRPOTrainer, args=small_config(tmp_path, GRPOConfig, **shared))
    grpo.train()
    for mine, theirs in zip(ours.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (ours, grpo)]
    for mine, theirs in zip(*logs, strict=True):
        assert all(mine[name] == value for name, value in theirs.items() if "time" not in name)


def test_a_prompt_like_the_unguided_one_has_ratio_one(tmp_path, monkeypatch):
    # Guidance that changes nothing: the group is on-policy GRPO on its new rollouts.
    monkeypatch.setattr("trl_bridge.methods.actguide_rollouts.guided_prompt", lambda prompt, steps, template: prompt)
    trainer = guide_trainer(tmp_path, watch_guidance(), beta=0.0)
    trainer.train()
    assert taught_rows(trainer)
    ratios = [log["actguide/ratio_mean"] for log in trainer.logged if "actguide/ratio_mean" in log]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-5)
    assert max(replay_group(trainer, lambda p: p.policy_loss())) < 2e-4


@pytest.mark.parametrize(("advantage", "gradient"), [(1.0, -0.1), (-1.0, 0.0)])
def test_clipping_of_tokens_that_only_guidance_makes_likely(tmp_path, advantage, gradient):
    trainer = guide_trainer(tmp_path, beta=0.0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    log_probs = torch.tensor([[math.log(0.05)]], requires_grad=True)
    scores = (log_probs, torch.zeros(1, 1), None)
    inputs = {
        "guided": torch.tensor([True]),
        "guided_per_token_logps": torch.tensor([[math.log(0.5)]]),
        "advantages": torch.tensor([advantage]),
        "prompt_ids": torch.tensor([[5]]),
        "prompt_mask": torch.ones(1, 1),
        "completion_ids": torch.tensor([[6]]),
        "completion_mask": torch.ones(1, 1, dtype=torch.long),
        "tool_mask": torch.ones(1, 1, dtype=torch.long),
        "num_items_in_batch": torch.tensor(float(trainer.args.steps_per_generation)),
    }
    loss = trainer.policy.loss_of(scores, trainer.policy_inputs(inputs, scores))
    loss.backward()
    assert log_probs.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_lora_student_and_its_reference(tmp_path, num_iterations):
    # With an adapter policy and reference are one model: the second scoring of a batch must not be taken for the first.
    options = {"peft_config": small_lora(), "beta": 0.1, "temperature": 0.7, "num_iterations": num_iterations}
    trainer = guide_trainer(tmp_path, watch_guidance(), **options)
    trainer.train()
    trained = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.states[-1][name])}
    assert trained and all("lora" in name for name in trained)
    assert taught_rows(trainer)
    base = {name: weight.double() for name, weight in small_model().named_parameters()}
    for batch in batches(trainer):
        with torch.no_grad():
            want, _ = objectives.scores(small_model().double(), base, batch, 0.7)
        shown = batch["completion_mask"] > 0
        assert torch.allclose(batch["ref_per_token_logps"].double()[shown], want[shown], atol=1e-5)
        assert ("old_per_token_logps" in batch) == (num_iterations == 2)
    ratios = [log["actguide/ratio_mean"] for log in trainer.logged if "actguide/ratio_mean" in log]
    assert any(abs(ratio - 1) > 1e-3 for ratio in ratios)


# vLLM


@pytest.fixture
def engine(monkeypatch):
    class AnyGroup(Engine):
        def generate(self, prompts, images, num_generations, profiler):
            # As its server: each prompt once.
            assert all(prompts[row] == prompts[row - row % num_generations] for row in range(len(prompts)))
            return super().generate(prompts, images, 4, profiler)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", AnyGroup)
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_vllm_available", lambda: True, raising=False)


def test_vllm_keeps_guided_rows(tmp_path, engine):
    trainer = guide_trainer(tmp_path, watch_guidance(), use_vllm=True, vllm_mode="colocate")
    trainer.train()
    assert taught_rows(trainer)
    model = trainer.initial_model
    checked = 0
    for batch in batches(trainer):
        if "guided" not in batch:
            continue
        weights = trainer.born[int(batch["born"][0]) - 1]
        prompt = {"prompt_ids": batch["guided_prompt_ids"], "prompt_mask": batch["guided_prompt_mask"]}
        with torch.no_grad():
            old, _ = objectives.scores(model, weights, {**batch, **prompt})
        shown = batch["completion_mask"] > 0
        assert torch.allclose(batch["old_per_token_logps"][shown], old[shown], atol=1e-4)
        # The engine is off by a constant for each row, guided or not: no shift by guidance in the correction.
        gap = ((old - batch["sampling_per_token_logps"]) * shown).sum(1, keepdim=True)
        kept = gap.exp() <= 3.0
        assert torch.allclose(batch["importance_sampling_ratio"], torch.where(kept, gap.exp(), 0.0), atol=1e-3)
        checked += int((batch["importance_sampling_ratio"][batch["guided"]] > 0.01).sum())
    assert checked


def test_the_parent_scores_the_old_policy_first():
    function, ours = GRPOTrainer._generate_and_score_completions, ActGuideTrainer._parent_scores_old_policy
    source, place = source_of(function), place_of(ours)
    first, second = (source.index(text) for text in ("old_per_token_logps, _, _ =", "ref_per_token_logps, _, _ ="))
    assert source.index("self._get_per_token_logps_and_entropies(") - first < 60 and first < second, place
    assert source.index("= self._generate(prompts)") < first, place
    assert source.index("rewards_per_func = self._calculate_rewards(") > second, place


# Split and options


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, scripted, loss_type):
    scripted({q: index % 3 for index, q in enumerate(STEPS)})
    weights = []
    for size, steps in [(4, 4), (8, 2), (16, 1)]:
        trainer = guide_trainer(
            tmp_path,
            watch_guidance(),
            hard_threshold=0.0,
            reward_funcs=nine_reward([]),
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        assert len(trainer.windows[0]) == steps and taught_rows(trainer)
        weights.append(trainer.states[0])
    for other in weights[1:]:
        assert movement_error(other, {n: t.double() for n, t in weights[0].items()}, trainer.start) < 1e-5


def test_defaults():
    config = ActGuideConfig("folder", use_cpu=True, bf16=False)
    assert (config.hard_threshold, config.probe_rounds, config.probe_rollouts) == (0.0, 5, 2)
    assert (config.shaping_gamma, config.epsilon, config.delta, config.beta) == (0.0, 0.2, 3.0, 0.001)
    assert (config.loss_type, config.scale_rewards, config.show_last_step) == ("dapo", "group", False)


def test_a_dataset_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no `expert_steps` column"):
        guide_trainer(tmp_path, train_dataset=hint_rows())
