"""The group baselines on two gloo processes, launched as a user would, against the float64 reference."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from tests.distributed.launch import folder_of_runs, load, params_of
from tests.distributed.run_groups import CASES, DDP_ONLY, METHOD, RESUMED, options_of
from tests.helpers.group_losses import (
    guide_loss,
    hpt_loss,
    luffy_loss,
    prefix_loss,
    replay_relift,
    self_teacher_loss,
    srft_loss,
    uft_loss,
)
from tests.helpers.groups import hint_rows, replay_recorded
from tests.helpers.resume import assert_same
from tests.helpers.saved_models import assert_saved
from tests.helpers.training import small_lora, small_model
from trl_bridge.models import tiny_tokenizer
from trl_bridge.selftest.reference import objectives
from trl_bridge.training.dynamic_sampling import FreshPrompts


pytestmark = pytest.mark.distributed
TOLERANCE = 2e-4

LOSSES = {
    "luffy": luffy_loss(),
    "luffy dynamic": luffy_loss(),
    "srft": srft_loss(),
    "hpt": hpt_loss(),
    "hpt apart": hpt_loss(),
    "uft": uft_loss,
    "prefix-rft": prefix_loss,
    "ada-prefix": lambda p: p.policy_loss(),
}
# What our trainers log reduced over ranks, the same on each. TRL's own entries are the main process's.
OURS = (
    "expert/",
    "rollouts/",
    "sft/",
    "rl/",
    "dynamic_sampling/",
    *(f"{name.replace('-', '_')}/" for name in (*METHOD, *DDP_ONLY)),
)


def cases_of(*methods):
    """(backend, case) of these methods."""
    return params_of(
        {kind: [case for case in CASES[kind] if options_of(case) in methods] for kind in CASES}, "run_groups"
    )


# By backend.
folder = folder_of_runs("run_groups")


def student(name):
    """The model of a case before training, with an adapter where it trains one."""
    return get_peft_model(small_model(), small_lora()) if "lora" in name else small_model()


def _generation_batches(ranks):
    """The micro-batches of both ranks, by the generation batch that they are of."""
    size = ranks[0]["options"]["steps_per_generation"]
    first, second = (sum(rank["windows"], []) for rank in ranks)
    return [first[i : i + size] + second[i : i + size] for i in range(0, len(first), size)]


def _rl_mask(name, batch):
    """Tokens in the RL loss: own ones, and the expert's where the method has a loss of them there."""
    if options_of(name) in ("luffy", "luffy dynamic", "srft", "prefix-rft"):
        return batch["tool_mask"] | batch["expert_mask"]
    if options_of(name) == "hpt":  # of the second gate
        return batch["tool_mask"] | batch["expert_mask"] * (1 - batch["sft_mask"])
    return batch["tool_mask"]


def _joined(ranks, name):
    """The run with both ranks' micro-batches in each window."""
    for batches in _generation_batches(ranks):
        # Counted anew, since the trainer's own counts over both ranks are among what is tested.
        items = sum((_rl_mask(name, batch) * batch["completion_mask"]).sum() for batch in batches)
        sft_items = sum(batch["sft_mask"].sum() for batch in batches)
        for batch in batches:
            batch.update(num_items_in_batch=items, num_sft_items_in_batch=sft_items)
    windows = [first + second for first, second in zip(ranks[0]["windows"], ranks[1]["windows"], strict=True)]
    return SimpleNamespace(
        **{**ranks[0], "windows": windows}, initial_model=student(name), logged=ranks[0]["log"], world_size=2
    )


@pytest.mark.parametrize(("kind", "name"), cases_of(*LOSSES))
def test_two_ranks_equal_the_reference(folder, kind, name):
    run = _joined(load(folder(kind), name), name)
    steps = len(run.windows)
    extra = {"hint_coef": METHOD["uft"]["hint_coef"], "share": 0.2, "delta": run.args.delta}
    o = {**run.options, **extra, "world_size": 2, "schedule": lambda step: (steps - step) / steps}
    assert any(batch["expert_mask"].any() for window in run.windows for batch in window)
    errors = replay_recorded(run, run.initial_model, LOSSES[options_of(name)], o)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize(("kind", "name"), cases_of("relift", "relift one"))
def test_relift_on_two_ranks_equals_the_reference(folder, kind, name):
    run = _joined(load(folder(kind), name), name)
    # The second step of an optimizer of its own reads the first one's moments.
    assert sum(map(bool, run.taken)) >= (2 if run.args.separate_optimizer else 1)
    errors, _ = replay_relift(run)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize(("kind", "name"), cases_of("actguide"))
def test_actguide_on_two_ranks_equals_the_reference(folder, kind, name):
    ranks = load(folder(kind), name)
    run = _joined(ranks, name)
    steps = len(run.windows)
    extra = {"delta": run.args.delta, "gamma": run.args.shaping_gamma, "world_size": 2}
    o = {**run.options, **extra, "schedule": lambda step: (steps - step) / steps}
    # Guided rows on either rank alone in some batch, and a group of them on both ranks.
    guided = [
        [int(batch["guided"].sum()) if "guided" in batch else 0 for window in rank["windows"] for batch in window]
        for rank in ranks
    ]
    assert any(a != b for a, b in zip(*guided, strict=True)) and sum(map(sum, guided)) >= 8, guided
    # The KL reference is the initial model, or the base with the adapter switched off.
    initial = small_model().double().eval()
    for batch in sum(run.windows, []):
        with torch.no_grad():
            want, _ = objectives.scores(initial, {}, batch, o["temperature"])
        shown = batch["completion_mask"] > 0
        assert torch.allclose(batch["ref_per_token_logps"].double()[shown], want[shown], atol=1e-5)
    errors = replay_recorded(run, run.initial_model, guide_loss(run), o)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize(("kind", "name"), cases_of("self-teacher", "self-teacher average"))
def test_self_teacher_on_two_ranks_equals_the_reference(folder, kind, name):
    run = _joined(load(folder(kind), name), name)
    steps = len(run.windows)
    o = {**run.options, "world_size": 2, "schedule": lambda step: (steps - step) / steps}
    for update, window in enumerate(run.windows):
        for batch in window:
            batch["update"] = update
    averages = None
    if run.args.self_teacher == "average":
        averages = [{n: t.double() for n, t in run.start.items()}]
        for state in run.states:
            averages.append({n: 0.7 * t + 0.3 * state[n].double() for n, t in averages[-1].items()})
    formula = self_teacher_loss(run.args, weight=run.args.kl_weight, gate=run.args.kl_gate, averages=averages)
    errors = replay_recorded(run, run.initial_model, formula, o)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_groups"))
def test_ranks_agree_to_the_bit(folder, kind, name):
    first, second = load(folder(kind), name)
    for part in ("states", "shared"):
        assert_same(first[part], second[part], part)
    logs = [
        [{k: v for k, v in entry.items() if k.startswith(OURS)} for entry in rank["log"]] for rank in (first, second)
    ]
    assert logs[0][0]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("kind", "name"), params_of(CASES, "run_groups"))
def test_saved_model_is_the_student(folder, kind, name, tmp_path):
    trained = load(folder(kind), name)[0]["states"][-1]
    assert_saved(folder(kind) / name / "final", trained, small_model() if "lora" in name else None, tmp_path)


@pytest.mark.parametrize(("kind", "name"), cases_of("hpt apart"))
def test_one_rank_trains_by_sft_and_the_other_by_rl(folder, kind, name):
    first, second = load(folder(kind), name)
    for left, right in zip(first["windows"], second["windows"], strict=True):
        # The demonstrations of a generation batch may all be in one of its micro-batches.
        assert any(batch["sft_mask"].any() for batch in left) and any(batch["advantages"].any() for batch in right)
        assert not any(batch["tool_mask"].any() for batch in left)
        assert all(batch["tool_mask"].all() and not batch["sft_mask"].any() for batch in right)


def test_groups_straddle_the_ranks(folder):
    first, second = load(folder("ddp"), "hpt")
    # Six rows each: prompts of the middle group are on both.
    prompts = [
        {tuple(row.tolist()) for batch in rank["windows"][0][:1] for row in batch["prompt_ids"]}
        for rank in (first, second)
    ]
    assert len(prompts[0] & prompts[1]) == 1


def test_dead_groups_give_way_on_two_ranks(folder):
    """The second and the third group to the first two of fresh prompts: the rows of either come from, or go to, both ranks."""
    ranks = load(folder("ddp"), "luffy dynamic")
    seed, tokenizer, rows = ranks[0]["args"].seed, tiny_tokenizer(), hint_rows(every=2)
    fresh = FreshPrompts(len(rows), seed)
    generations = _generation_batches(ranks)
    for batches in generations:
        prompts = [
            [tokenizer.decode(ids[there > 0]) for ids, there in zip(b["prompt_ids"], b["prompt_mask"], strict=True)]
            for b in batches
        ]
        second, third = (rows[number]["prompt"] for number in fresh.draw(3)[:2])
        (first,) = set(prompts[0]) - {second} or {second}
        assert Counter(prompts[0]) == Counter([first] * 4) + Counter([second] * 2)
        assert Counter(prompts[1]) == Counter([second] * 2) + Counter([third] * 4)
        # Each group has the advantages of 0, 1, 2 and 3, two of them on either rank where it straddles.
        values = [value for batch in batches for value in batch["advantages"].tolist()]
        assert Counter(round(v, 3) for v in values) == dict.fromkeys((-1.162, -0.387, 0.387, 1.162), 3)
    for entry in ranks[0]["log"]:
        assert entry["dynamic_sampling/generations"] == 2.0 and entry["dynamic_sampling/dead_groups"] == 0.0
    assert ranks[0]["shared"]["fresh_prompts"] == {**fresh.state_dict(), "rollouts": 2 * 12 * len(generations)}


@pytest.mark.parametrize(("kind", "name"), params_of(RESUMED, "run_groups", "resume "))
def test_resume_is_exact_on_two_ranks(folder, kind, name):
    for rank in range(2):
        straight, resumed = torch.load(folder(kind) / f"{name}-resume-{rank}.pt", weights_only=False)
        assert_same(resumed, straight)
