"""Trains the stream baselines on the ranks that torchrun starts, recorded. Usage: rank.py run_streams KIND FOLDER [NAME...]"""

from pathlib import Path

import torch
from trl import GRPOTrainer
from trl.generation import vllm_generation

from tests.distributed.cases import FSDP, on_main_process, zero
from tests.distributed.run import pretend_accelerator
from tests.helpers import engines
from tests.helpers.resume import StopAt
from tests.helpers.streams import logged, make, options_of, recording, sharp_model, state_of, trained, weights_of
from tests.helpers.training import small_lora
from trl_bridge import AlternatingTrainer, CHORDTrainer, NaiveMixTrainer, PackedGRPOTrainer


SGD = {"optim": "sgd", "learning_rate": 0.1}
MU = {"mu_peak": 0.8, "mu_valley": 0.2, "mu_warmup_steps": 1, "mu_decay_steps": 2}
NAIVE_MIX = (NaiveMixTrainer, {"sft_weight": 0.5, "sft_weighting": "likelihood", **SGD})
ALTERNATING = (AlternatingTrainer, {})
CHORD = (CHORDTrainer, {**MU, "enable_phi_function": True, **SGD})
LORA = {"peft_config": small_lora()}
# A model that each rank has in full, or whose weights are spread as those of the KL reference.
TEACHER = {"teachers": ["builtin:tiny"], "teacher_weight": 0.5}
ABSENT = {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}
ZERO_3 = zero(3, stage3_param_persistence_threshold=0)
# By backend: method -> trainer, what the method is tested with, and what the backend needs.
CASES = {
    "ddp": {
        "naive-mix": (*NAIVE_MIX, {}),
        "alternating": (*ALTERNATING, {}),
        "chord": (*CHORD, {}),
        "naive-mix, teacher": (*NAIVE_MIX, TEACHER),
        "chord, teacher": (*CHORD, {**TEACHER, "teacher_form": "loss"}),
    },
    "fsdp": {
        "naive-mix, teacher": (*NAIVE_MIX, {**FSDP, **TEACHER, "teacher_offload": True}),
        # The KL reference too has the main process's weights.
        "naive-mix": (*NAIVE_MIX, {**FSDP, **ABSENT, "beta": 0.1}),
        "alternating": (*ALTERNATING, {**FSDP, "gradient_checkpointing": True}),
        "chord": (*CHORD, FSDP),
        # SGD in its resume too: an optimizer without a state.
        "chord, lora": (*CHORD, {**FSDP, "gradient_checkpointing": True, **SGD, **LORA}),
    },
    "deepspeed": {
        "naive-mix, teacher": (*NAIVE_MIX, {**zero(2), **TEACHER, "teacher_offload": True}),
        "chord, teacher": (*CHORD, {**ZERO_3, **TEACHER, "teacher_form": "loss"}),
        "naive-mix": (*NAIVE_MIX, {**zero(2), "gradient_checkpointing": True}),
        "alternating": (*ALTERNATING, ZERO_3),
        "chord": (*CHORD, zero(1)),
        "naive-mix, lora": (*NAIVE_MIX, {**zero(1), **LORA}),
        "alternating, lora": (*ALTERNATING, {**zero(2), "gradient_checkpointing": True, **LORA}),
        "chord, lora": (*CHORD, {**ZERO_3, "gradient_checkpointing": True, **LORA}),
    },
}
# Cases with whose backend a run is stopped and resumed.
RESUMES = {
    "ddp": ["alternating"],
    "fsdp": ["alternating", "chord, lora"],
    "deepspeed": ["alternating", "alternating, lora", "chord, lora"],
}
# Two trainers that are GRPO are compared with each other, not with a replay.
PACKED = {
    # VESPO sums what the sampler's correction says of every place, those that ranks pad for each other too.
    "ddp": {
        "grpo": {},
        "vespo, sampler": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate", **engines.OPTIONS},
    },
    "fsdp": {"grpo": FSDP, "grpo, lora": {**FSDP, "gradient_checkpointing": True, **LORA}},
    "deepspeed": {"grpo": ZERO_3, "grpo, lora": {**zero(2), "gradient_checkpointing": True, **LORA}},
}


class UnevenClient(engines.Client):
    """A server whose answers are short on the first rank, and about as likely as the policy finds them."""

    def generate(self, prompts, n, **options):
        answer = super().generate(prompts, n, **options)
        rows = answer["completion_ids"]
        rows[: len(rows) // 2] = [ids[:2] for ids in rows[: len(rows) // 2]]
        return {**answer, "logprobs": [[[-4.6]] * len(ids) for ids in rows]}


ZERO = {"mu_peak": 0.0, "mu_valley": 0.0, "padding_free": False}


def main(kind: str, place: str, *names: str) -> None:
    folder = Path(place)
    if kind != "ddp":
        pretend_accelerator()
    engines.serve()
    vllm_generation.VLLMClient = UnevenClient
    for name, (trainer_class, method, way) in CASES[kind].items():
        if names and name not in names:
            continue
        options = {**method, **way}
        absent = way.get("fsdp_config") == ABSENT["fsdp_config"]
        model = on_main_process(sharp_model()) if absent else sharp_model()
        trainer = trained(recording(trainer_class), folder / name, model=model, max_steps=4, **options)
        trainer.save_model(str(folder / name / "final"))
        record = {
            "windows": trainer.windows,
            "states": trainer.states,
            "start": trainer.start,
            "options": {k: v for k, v in options_of(trainer).items() if not callable(v)},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        torch.save(record, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    pairs = {} if kind != "ddp" else limits(folder)
    for name in [name for name in RESUMES[kind] if not names or f"resume {name}" in names]:
        pairs[name] = resume(folder / f"resume {name}", CASES[kind][name][2])
    for name in [name for name in PACKED[kind] if not names or name in names]:
        pairs[name] = packed(folder / name, PACKED[kind][name])
    torch.save(pairs, folder / f"pairs-{trainer.accelerator.process_index}.pt")


def resume(folder: Path, way: dict) -> tuple[dict, dict]:
    """What a run that was stopped and resumed ends with, and one that was not: inside an RL phase, between two updates of a generation batch."""
    options = {"steps_per_generation": 4, "rl_steps": 2, "sft_steps": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 1, **way}
    straight = trained(AlternatingTrainer, folder / "straight", **options)
    trained(AlternatingTrainer, folder / "halves", callbacks=[StopAt(3)], **options)
    resumed = make(AlternatingTrainer, folder / "halves", **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "alternating/rl_update") == [0.0, 0.0, 1.0, 1.0, 0.0]
    return state_of(resumed), state_of(straight)


def packed(folder: Path, way: dict) -> dict:
    """GRPO with padding and without: the weights after it, and the shares of dead groups."""
    options = {"max_steps": 4, "num_generations": 2, **SGD, **way}
    found: dict = {}
    for free in (False, True):
        trainer = trained(PackedGRPOTrainer, folder / str(free), padding_free=free, **options)
        found[free] = weights_of(trainer)
        found["dead"] = logged(trainer, "frac_reward_zero_std")
        found["packs"] = trainer._packs
        found["useful", free] = logged(trainer, "efficiency/useful_tokens")
    return found


def limits(folder: Path) -> dict:
    """mu = 0 is GRPO, synced as GRPO is."""
    runs = ((GRPOTrainer, {}), (CHORDTrainer, ZERO))
    return {cls.__name__: weights_of(trained(cls, folder / cls.__name__, **options)) for cls, options in runs}
