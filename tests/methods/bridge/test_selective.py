"""`sft_weighting` and `preset="selective"` through the real trainer."""

import math

import pytest
import torch
from datasets import Dataset

from tests.helpers.training import (
    PAIRS,
    RecordingTrainer,
    adapters,
    rl_rows,
    sft_rows,
    small_lora,
    small_model,
    small_trainer,
)
from trl_bridge.selftest.reference import objectives


def answer_reward(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def half_wrong_rows():
    completions = [str(a + b if a % 2 else a + b + 1) for a, b in PAIRS]
    prompts, answers = [f"{a}+{b}=" for a, b in PAIRS], [str(a + b) for a, b in PAIRS]
    return Dataset.from_dict({"prompt": prompts, "completion": completions, "answer": answers})


def rl_answer_rows():
    return rl_rows().add_column("answer", [str(a + b) for a, b in PAIRS])


def short_reward(completions, **kwargs):
    """Right where the first character comes early in the alphabet: a reward that likelihood says something about."""
    return [float(bool(text) and text[0].isalnum()) for text in completions]


def _run(tmp_path, **options):
    trainer = small_trainer(tmp_path, RecordingTrainer, peft_config=small_lora(), **options)
    trainer.train()
    return trainer


def _log_likelihoods(weights, batch, eos):
    """Summed log-likelihood of the rollouts that ended, and which those are."""
    model = small_model().double()
    with torch.no_grad():
        log_p, _ = objectives.scores(model, weights, batch)
    mask = batch["completion_mask"]
    ends = batch["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1) == eos
    return (log_p * mask).sum(1)[ends], ends


def _logistic_regression(s, r, penalty=1.0):
    """Penalised fit of r on standardised s by gradient descent to convergence."""
    z = (s - s.mean()) / (s.std(unbiased=False) + 1e-6)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([b], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(b[0] + b[1] * z, r, reduction="sum")
        value = value + penalty * b[1] ** 2
        value.backward()
        return value

    optimizer.step(loss)
    return b.detach()


@pytest.mark.parametrize("per_token", [False, True])
def test_judge_weights_equal_a_plain_fit(tmp_path, per_token):
    options = {"sft_weighting": "judge", "judge_window": 2, "reward_funcs": short_reward, "max_steps": 4}
    options["judge_per_token"] = per_token
    trainer = _run(tmp_path, per_device_train_batch_size=32, cooperative_gain=False, temperature=1.0, **options)
    eos = trainer._tokenizer.eos_token_id
    a, b = adapters(trainer.start["w"])
    states = [trainer.start, *trainer.states]
    windows = []
    for window, state in zip(trainer.windows, states, strict=False):
        a, b = adapters(state["w"])
        policy = {n: t.double() + (b[n].double() @ a[n].double() if n in a else 0) for n, t in state["theta"].items()}
        pairs = []
        for batch in window["rl"]:
            s, ends = _log_likelihoods(policy, batch, eos)
            s = s / batch["completion_mask"].sum(1)[ends] if per_token else s
            pairs.append((s, (batch["rollout_reward"][ends] >= 1.0).double()))
        windows.append((torch.cat([s for s, _ in pairs]), torch.cat([r for _, r in pairs]), policy))
    assert all(w is not None and torch.equal(w, torch.ones_like(w)) for w in trainer.windows[0]["weights"])
    checked = 0
    for step in (2, 3):
        s = torch.cat([windows[step - 2][0], windows[step - 1][0]])
        r = torch.cat([windows[step - 2][1], windows[step - 1][1]])
        if not 0 < r.mean() < 1:
            continue
        b0, b1 = _logistic_regression(s, r)
        for batch, got in zip(trainer.windows[step]["sft"], trainer.windows[step]["weights"], strict=True):
            with torch.no_grad():
                log_p, mask, _ = objectives.demonstration_scores(small_model().double(), windows[step][2], batch)
            own = (log_p * mask).sum(1) / (mask.sum(1) if per_token else 1)
            own = own.clamp(s.min(), s.max())
            q = torch.sigmoid(b0 + b1 * (own - s.mean()) / (s.std(unbiased=False) + 1e-6))
            want = ((q + 0.001) / (r.mean() + 0.001)).clamp(max=1) ** 4
            assert torch.allclose(got.double().squeeze(1), want, atol=5e-3), (step, got, want)
            checked += 1
    assert checked >= 2, "no window had both rewards, so nothing was compared"


def test_verdict_keeps_right_demonstrations_and_drops_wrong_ones(tmp_path):
    trainer = _run(
        tmp_path,
        sft_weighting="verdict",
        reward_funcs=answer_reward,
        train_dataset=rl_answer_rows(),
        sft_dataset=half_wrong_rows(),
        max_steps=2,
    )
    rows = half_wrong_rows()
    seen = set()
    for window in trainer.windows:
        for batch, weights in zip(window["sft"], window["weights"], strict=True):
            for ids, labels, weight in zip(batch["input_ids"], batch["labels"], weights, strict=True):
                text = trainer._tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
                prompt = trainer._tokenizer.decode(ids[(labels == -100) & (ids != 0)], skip_special_tokens=True)
                right = text == str(eval(prompt.rstrip("=")))
                assert weight.item() == pytest.approx(float(right), abs=1e-3), (prompt, text)
                seen.add(right)
    assert seen == {True, False} and len(rows) == 16
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert 0 < entry["sft/weight_mean"] < 1 and entry["sft/verdict_flip_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("wrong", [True, False])
def test_a_warning_where_nothing_is_left_of_the_demonstrations(tmp_path, wrong, caplog):
    rows = half_wrong_rows()
    right = [row["completion"] == row["answer"] for row in rows]
    rows = rows.select([index for index, each in enumerate(right) if each != wrong])
    options = {"reward_funcs": answer_reward, "train_dataset": rl_answer_rows(), "sft_dataset": rows}
    with caplog.at_level("WARNING"):
        trainer = _run(tmp_path, sft_weighting="verdict", judge_window=2, max_steps=5, **options)
    weights = [entry["sft/weight_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(weights) == 5 and all((weight < 0.01) == wrong for weight in weights)
    told = [
        record.getMessage() for record in caplog.records if "left nothing of the demonstrations" in record.getMessage()
    ]
    # Once, not once an update.
    assert len(told) == wrong and all("for 2 updates" in message for message in told)


def test_verdicts_leave_the_rollouts_metrics_alone(tmp_path):
    shared = {"reward_funcs": answer_reward, "train_dataset": rl_answer_rows(), "sft_dataset": half_wrong_rows()}
    logs = []
    for weighting in ("none", "verdict"):
        trainer = _run(tmp_path / weighting, sft_weighting=weighting, max_steps=1, **shared)
        logs.append(next(e for e in trainer.state.log_history if "loss" in e))
    names = [n for n in logs[0] if n.startswith(("reward", "completions", "frac_"))]
    assert names and {n: logs[1][n] for n in names} == {n: logs[0][n] for n in names}


def test_weights_of_likelihood_have_mean_one_in_the_first_window(tmp_path):
    trainer = _run(tmp_path, sft_weighting="likelihood", max_steps=1)
    window = trainer.windows[0]
    total = sum(
        float((weights * (batch["labels"][:, 1:] != -100)).sum())
        for batch, weights in zip(window["sft"], window["weights"], strict=True)
    )
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window["sft"])
    assert total / tokens == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("columns", "kind"), [(True, "judge_verdict"), (False, "judge")], ids=["with columns", "without"]
)
def test_selective_preset_takes_verdicts_where_the_rows_allow(tmp_path, columns, kind):
    rows = half_wrong_rows() if columns else sft_rows()
    trainer = small_trainer(
        tmp_path,
        preset="selective",
        reward_funcs=answer_reward,
        train_dataset=rl_answer_rows(),
        sft_dataset=rows,
        max_steps=2,
    )
    assert trainer.weighting.kind == kind and trainer.args.cooperative_gain is False
    trainer.train()
    assert trainer.shadow is None
    assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)


def test_verdicts_without_the_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sft_weighting.*answer"):
        small_trainer(
            tmp_path, sft_weighting="verdict", reward_funcs=answer_reward, train_dataset=rl_answer_rows(), max_steps=1
        )


def test_explicit_values_beat_the_preset(tmp_path):
    trainer = small_trainer(tmp_path, preset="selective", sft_weighting="none", cooperative_gain=True)
    assert trainer.weighting.kind == "none" and trainer.args.cooperative_gain is True
