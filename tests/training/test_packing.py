"""Packed passes: the padded ones' numbers, from fewer positions."""

import logging
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.helpers.resume import StopAt, assert_same
from tests.helpers.streams import weights_of
from tests.helpers.training import movement_error, rl_rows, sft_rows, small_config, small_lora, small_model
from trl_bridge import BridgeTrainer, NaiveMixTrainer, PackedGRPOTrainer
from trl_bridge._upstream import attend_in_segments
from trl_bridge.models import tiny_tokenizer
from trl_bridge.training.packing import (
    Segments,
    deal,
    disagreement,
    lay_out_rollouts,
    lay_out_rows,
    positions_needed,
    reason_for_padding,
    run,
    spread,
)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
WINDOW = 6  # tokens, fewer than a row has
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.0}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **EXPERTS),
}


def model_of(config, **kwargs):
    attend_in_segments()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **kwargs).train()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def rollouts():
    """Six rollouts of two prompts: (ids, mask, completion length), one of them without a completion."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (6, 16), generator=generator)
    mask = torch.ones_like(ids)
    for row, tokens in enumerate((9, 1, 4, 0, 7, 2)):
        ids[row, :7] = ids[row // 3 * 3, :7]
        mask[row, : row // 3 * 3] = 0  # the second prompt is shorter
        mask[row, 7 + tokens :] = 0
    return ids * mask, mask, 9


def padded(model, ids, mask, length):
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -length:], outputs.entropy[:, -length:]


def packed(model, ids, mask, length, rows=range(6), share=True):
    layout = lay_out_rollouts(ids, mask, length, rows, share)
    where = torch.zeros_like(mask[:, -length:], dtype=torch.bool)
    where[list(rows)] = mask[list(rows), -length:].bool()
    outputs = run(model, layout, fused_lm_head=True)
    return spread(outputs.log_probs, layout, where), spread(outputs.entropy, layout, where)


def gradients(model, score, weights):
    model.zero_grad()
    log_probs, entropies = score()
    (log_probs * weights).sum().backward()
    return log_probs.detach(), entropies.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [range(6), [5, 0, 1], [2], [3], [3, 4], []], ids=str)
def test_positions_are_counted_as_they_are_laid_out(rows):
    ids, mask, length = rollouts()
    for prompt in (7, 1):
        batch = (ids[:, 7 - prompt :], mask[:, 7 - prompt :], length)
        assert positions_needed(*batch, rows) == lay_out_rollouts(*batch, rows, True).ids.numel()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradient_are_the_padded_ones(family, checkpointing, share):
    model = model_of(FAMILIES[family])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert reason_for_padding(model) is None
    batch = rollouts()
    there = batch[1][:, -9:]
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)) * there
    want = gradients(model, lambda: padded(model, *batch), weights)
    got = gradients(model, lambda: packed(model, *batch, share=share), weights)
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine, theirs * there, rtol=1e-5, atol=2e-5)
    size = sum(float(g.double().square().sum()) for g in want[2].values())
    error = sum(float((got[2][n] - g).double().square().sum()) for n, g in want[2].items())
    assert (error / size) ** 0.5 < 1e-5
    assert all((got[2][n] - g).norm() <= 1e-4 * g.norm() + 1e-6 for n, g in want[2].items())


def test_a_shared_prompt_is_run_once():
    ids, mask, length = rollouts()
    shared, apart = (lay_out_rollouts(ids, mask, length, range(6), share) for share in (True, False))
    # Each rollout: the prompt's last token, and its own but the last; each prompt's others once.
    assert shared.ids.numel() == (6 + 9 + 1 + 4) + (3 + 7 + 2)
    assert apart.ids.numel() == (3 * 6 + 9 + 1 + 4) + (2 * 3 + 7 + 2)
    assert (shared.labels != -100).sum() == mask[:, -length:].sum()


def test_rows_that_are_not_run_are_zero_and_change_nothing():
    model, batch = model_of(FAMILIES["llama"]), rollouts()
    full, some = packed(model, *batch)[0], packed(model, *batch, rows=[0, 4])[0]
    assert not some[[1, 2, 3, 5]].any()
    torch.testing.assert_close(some[[0, 4]], full[[0, 4]])


def test_without_a_row_every_gradient_is_zero_and_none_is_missing():
    model, batch = model_of(FAMILIES["llama"]), rollouts()
    packed(model, *batch, rows=[])[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_demonstrations_need_no_padding():
    model = model_of(FAMILIES["qwen2"])
    ids, mask, _ = rollouts()
    ids, mask = ids[:, 7:], mask[:, 7:]  # right-padded rows, one of them empty
    labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), -100)
    layout = lay_out_rows(ids, mask, labels)
    got = spread(run(model, layout, fused_lm_head=True).log_probs, layout, labels[:, 1:] != -100)
    want = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert layout.ids.numel() == sum(max(int(row.sum()) - 1, 0) for row in mask)


# Where it stands aside


@pytest.mark.parametrize(
    "config, kwargs, reason",
    [
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), {}, "not rotary"),
        (LlamaConfig(**SHAPE), {"attn_implementation": "eager"}, "'eager'"),
        (LlamaConfig(**SHAPE, attention_dropout=0.1), {}, "dropout"),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            {},
            "depend on the length",
        ),
    ],
    ids=["positions", "eager", "dropout", "dynamic"],
)
def test_models_that_stay_padded(config, kwargs, reason):
    assert reason in reason_for_padding(model_of(config, **kwargs))


def everything(self, queries, keys, window, device):
    """A mask that forgets causality."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_disagreement_sees_what_is_wrong(monkeypatch, with_gradient):
    model, batch = model_of(FAMILIES["mistral-window"]), rollouts()
    there = batch[1][:, -9:]

    def between():
        passes = (lambda: packed(model, *batch)[0], lambda: padded(model, *batch)[0] * there)
        return disagreement(*passes, model.get_input_embeddings(), with_gradient=with_gradient)

    assert between() < 1e-5
    monkeypatch.setattr(Segments, "_mask", everything)
    assert between() > 1e-2


def test_a_wrong_pass_is_noticed_at_the_first_update(tmp_path, monkeypatch, caplog):
    plain = trained(tmp_path, PackedGRPOTrainer, padding_free=False)
    monkeypatch.setattr(Segments, "_mask", everything)
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, PackedGRPOTrainer)
    assert "stands aside" in caplog.text and "differs from the padded one" in caplog.text
    assert error(trainer, plain) < 2e-4
    assert logged(trainer, "efficiency/useful_tokens")[-1] < 0.9


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["plain", "old scores"])
def test_where_the_first_pass_is_wrong_nothing_is_trained_by_it(tmp_path, monkeypatch, changes):
    plain = trained(tmp_path, PackedGRPOTrainer, padding_free=False, **changes)
    monkeypatch.setattr(Segments, "_mask", everything)
    trainer = trained(tmp_path, PackedGRPOTrainer, **changes)
    # Neither old scores, which are older than the first micro-batch, nor rows that were dealt anew.
    assert_same(weights_of(trainer), weights_of(plain))


def test_rollouts_without_tokens_are_no_check(tmp_path, monkeypatch, caplog):
    class TruncatedAtFirst(PackedGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["completion_mask"] *= self._step > 0
            return output

    monkeypatch.setattr(Segments, "_mask", everything)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, TruncatedAtFirst)
    assert "differs from the padded one" in caplog.text


# Dealing


@pytest.mark.parametrize("seed", range(20))
def test_dealing(seed):
    rng = random.Random(seed)
    micro_batches, size, group = rng.choice([(2, 8, 4), (4, 4, 8), (3, 6, 4), (1, 8, 8), (5, 2, 2)])
    rows = micro_batches * size
    keys = [row // group for row in range(rows)]
    dead = {key for key in set(keys) if rng.random() < 0.4}
    costs = [0 if key in dead else rng.randint(1, 50) for key in keys]
    order = rng.sample(range(rows), rows)
    keys, costs = [keys[i] for i in order], [costs[i] for i in order]
    dealt = deal(keys, costs, [10] * rows, micro_batches, size)
    assert sorted(row for batch in dealt for row in batch) == list(range(rows))
    assert all(len(batch) == size for batch in dealt)
    loads = [sum(costs[row] for row in batch) for batch in dealt]
    if size % group == 0:  # whole groups fit
        for key in set(keys) - dead:
            assert sum(any(keys[row] == key for row in batch) for batch in dealt) == 1
        assert (
            max(loads) - min(loads)
            <= max(sum(c for c, k in zip(costs, keys, strict=True) if k == key) for key in keys) + 10
        )


def test_live_groups_are_spread_over_the_micro_batches():
    keys = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    costs = [5] * 4 + [5] * 4 + [0] * 8
    dealt = deal(keys, costs, [7] * 16, 2, 8)
    assert [sorted({keys[row] for row in batch if costs[row]}) for batch in dealt] in ([[0], [1]], [[1], [0]])


# Training


def right_or_wrong(completions, **kwargs):
    """1 where a completion has two digits: many groups are all alike."""
    return [float(sum(c.isdigit() for c in text) >= 2) for text in completions]


def trained(
    tmp_path, trainer_class, model=None, reward=right_or_wrong, lora=None, callbacks=None, resume=False, **changes
):
    kwargs = {} if not hasattr(trainer_class, "demonstrations_due") else {"sft_dataset": sft_rows()}
    config = getattr(trainer_class, "config_class", GRPOConfig)
    peft = {"peft_config": small_lora() if lora is None else lora} if trainer_class is BridgeTrainer or lora else {}
    trainer = trainer_class(
        model=small_model() if model is None else model,
        reward_funcs=reward,
        args=small_config(tmp_path / "run", config, **changes),
        train_dataset=rl_rows(),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **kwargs,
        **peft,
    )
    trainer.before = weights_of(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def error(got, want):
    """Error of the weights over their movement."""
    return movement_error(weights_of(got), weights_of(want), want.before)


def logged(trainer, name):
    return [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]


OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 4, "max_steps": 5}
RUNS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", **OFF_POLICY},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", **OFF_POLICY},
    "vespo": {"loss_type": "vespo", **OFF_POLICY},
    "iterations": OFF_POLICY,
    "two generations a window": {"steps_per_generation": 1},
    "kl": {"beta": 0.1},
    "entropy": {"entropy_coef": 0.1},
    "quantile": {"top_entropy_quantile": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "temperature": {"temperature": 0.7},
    "unshared": {"share_prompts": False},
}


@pytest.mark.parametrize("name", RUNS)
def test_grpo_within_tolerance_of_trl(tmp_path, name):
    changes = {"learning_rate": 1e-2, **RUNS[name]}
    if "beta" in changes:
        small_model().save_pretrained(tmp_path / "model")
        changes["model"] = str(tmp_path / "model")  # TRL builds its reference by the model's name
    stock = {key: value for key, value in changes.items() if key != "share_prompts"}
    want = trained(tmp_path, GRPOTrainer, **stock)
    got = trained(tmp_path, PackedGRPOTrainer, **changes)
    assert error(got, want) < 2e-4
    dead = [share for share in logged(want, "frac_reward_zero_std") if share is not None]
    assert max(dead) > 0, "no group was dead, so nothing was skipped"
    for metric in ("grad_norm", "completions/mean_length", "reward"):
        numbers = zip(logged(got, metric), logged(want, metric), strict=True)
        assert all(mine == theirs or mine == pytest.approx(theirs, rel=1e-3, abs=1e-6) for mine, theirs in numbers)


def test_without_the_option_it_is_trl_to_the_bit(tmp_path):
    want = trained(tmp_path, GRPOTrainer)
    got = trained(tmp_path, PackedGRPOTrainer, padding_free=False)
    assert all(torch.equal(weight, weights_of(want)[name]) for name, weight in weights_of(got).items())
    assert logged(got, "loss") == logged(want, "loss")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "selective", "sft_weighting": "judge"},
        {"preset": "selective", "sft_weighting": "judge", "temperature": 0.7},
        {"shadow_rollout_fraction": 0.5},
        {"shadow_importance_sampling": False},
        {"sft_pairing": "prompt"},
        {"lean": True},
        OFF_POLICY,
        {"beta": 0.1},
    ],
    ids=["paper", "judge", "judge-temperature", "fraction", "no-ratio", "paired", "lean", "iterations", "kl"],
)
def test_bridge_within_tolerance_of_its_padded_self(tmp_path, changes):
    want, got = (
        trained(tmp_path, BridgeTrainer, padding_free=free, max_grad_norm=0.0, **{"max_steps": 4, **changes})
        for free in (False, True)
    )
    assert error(got, want) < 2e-4
    if want.shadow is not None:
        mine, theirs = got.shadow_state_dict(), want.shadow_state_dict()
        assert (
            movement_error(
                mine, theirs, want.before if not changes.get("lean") else {n: 0 * v for n, v in theirs.items()}
            )
            < 2e-4
        )
        assert logged(got, "bridge/gain") == pytest.approx(logged(want, "bridge/gain"), rel=1e-2, abs=1e-6)
    for metric in ("sft/loss", "sft/weight_mean", "sft/judge_slope", "grad_norm"):
        if logged(want, metric)[-1] is not None:
            assert logged(got, metric)[1:] == pytest.approx(logged(want, metric)[1:], rel=1e-3)


def test_bfloat16(tmp_path):
    want, got = (trained(tmp_path, NaiveMixTrainer, padding_free=free, bf16=True) for free in (False, True))
    assert not any("stands aside" in str(entry) for entry in got.state.log_history)
    assert got._packs and error(got, want) < 0.05


@pytest.mark.parametrize("trainer_class", [PackedGRPOTrainer, BridgeTrainer])
def test_an_update_without_a_live_rollout_still_decays_the_moments(tmp_path, trainer_class):
    def first_update_only(completions, trainer_state, **kwargs):
        return [float(len(text)) if trainer_state.global_step == 0 else 1.0 for text in completions]

    want, got = (
        trained(tmp_path, trainer_class, reward=first_update_only, padding_free=free, learning_rate=1e-2)
        for free in (False, True)
    )
    assert logged(want, "frac_reward_zero_std")[1:] == [1.0, 1.0]
    assert error(got, want) < 2e-4
    if trainer_class is BridgeTrainer:
        assert movement_error(got.shadow_state_dict(), want.shadow_state_dict(), want.before) < 2e-4
    # No rollout has an entropy that anybody has computed.
    assert logged(got, "entropy")[1:] == [None, None]


def test_metrics_are_over_the_live_rollouts(tmp_path):
    seen = []

    class Recording(PackedGRPOTrainer):
        def _compute_loss(self, model, inputs):
            live = inputs["advantages"] != 0
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                _, entropies, _ = self._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].size(1), compute_entropy=True
                )
            counted = inputs["completion_mask"] * live[:, None]
            if counted.any():
                seen.append(float((entropies * counted).sum() / counted.sum()))
            return super()._compute_loss(model, inputs)

    trainer = trained(tmp_path, Recording, max_steps=1)
    assert logged(trainer, "entropy") == pytest.approx([sum(seen) / len(seen)], rel=1e-5)
    assert logged(trainer, "efficiency/useful_tokens") == [1.0]


def test_dead_rollouts_keep_their_old_scores(tmp_path):
    seen = []

    class Recording(PackedGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self._live is not None:
                seen.append((self._live, scores[0].detach().clone()))
            return scores

    trained(tmp_path, Recording, **OFF_POLICY)
    dead = [(scores[~live.rows], live.others[~live.rows]) for live, scores in seen if not live.rows.all()]
    assert dead
    # A ratio of one: with zeros it would be exp(0 - old), which overflows for a token that was unlikely enough.
    assert all(torch.equal(scores, old) and old.any() for scores, old in dead)


def test_a_lora_student_within_tolerance(tmp_path):
    lora = small_lora()
    want, got = (trained(tmp_path, PackedGRPOTrainer, lora=lora, padding_free=free) for free in (False, True))
    assert all("lora" in name for name in weights_of(got)) and error(got, want) < 2e-4


@pytest.mark.parametrize("changes", [{}, OFF_POLICY], ids=["plain", "inside a generation batch"])
def test_resume_is_exact(tmp_path, changes):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, **changes}
    straight = trained(tmp_path / "straight", PackedGRPOTrainer, **options)
    trained(tmp_path / "halves", PackedGRPOTrainer, callbacks=[StopAt(3)], **options)
    resumed = trained(tmp_path / "halves", PackedGRPOTrainer, resume=True, **options)
    assert_same(weights_of(resumed), weights_of(straight))
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


@pytest.mark.parametrize("changes", [{"loss_type": "bnpo"}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}, {}])
def test_rows_stay_where_the_divisor_is_the_micro_batchs(tmp_path, changes):
    seen = {}

    def recording(trainer_class):
        class Recording(trainer_class):
            def _compute_loss(self, model, inputs):
                seen.setdefault(trainer_class, []).append(inputs["completion_ids"].tolist())
                return super()._compute_loss(model, inputs)

        return Recording

    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        trained(tmp_path, recording(trainer_class), max_steps=2, **changes)
    assert (seen[PackedGRPOTrainer] == seen[GRPOTrainer]) == bool(changes)


def test_the_judge_sees_the_likelihood_of_dead_rollouts_too(tmp_path):
    options = {"preset": "selective", "sft_weighting": "judge", "max_completion_length": 48, "max_steps": 2}

    def all_alike(completions, **kwargs):
        return [1.0] * len(completions)

    seen = []
    for free in (False, True):
        trainer = trained(tmp_path, BridgeTrainer, reward=all_alike, padding_free=free, **options)
        pairs = [pair for window in trainer.weighting.state_dict()["rollouts"] for pair in sorted(window.tolist())]
        seen.append(torch.tensor(pairs))
    assert len(seen[0]) > 4  # rollouts that have come to their end
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
