"""What the self-test looks at: each check trains for a few updates, and returns how far off it was and how far it may be."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils import _pytree as pytree
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ..contract import LATE, breaches
from ..methods.ada_prefix import AdaPrefixTrainer
from ..methods.alternating import AlternatingTrainer
from ..methods.aopd import AOPDTrainer
from ..methods.bridge.trainer import BridgeTrainer
from ..methods.chord import CHORDTrainer
from ..methods.hpt import HPTTrainer
from ..methods.luffy import LUFFYTrainer
from ..methods.naive_mix import NaiveMixTrainer
from ..methods.opd import OPDTrainer
from ..methods.packed_grpo import PackedGRPOTrainer
from ..methods.prefix_rft import PrefixRFTTrainer
from ..methods.self_teacher import SelfTeacherTrainer
from ..methods.srft import SRFTTrainer
from ..methods.two_stage import TwoStageConfig, TwoStageTrainer
from ..methods.uft import UFTTrainer
from ..models import tiny_model, tiny_tokenizer
from . import distillation, group_losses, groups, lightning, streams
from .lean import lean_trainer, replayed
from .runs import (
    RecordingTrainer,
    StopAt,
    digits_reward,
    movement_error,
    replay,
    rl_rows,
    sft_rows,
    small_config,
    small_model,
    small_trainer,
)


Outcome = tuple[float, float]
Check = Callable[[Path, dict[str, Any]], Outcome]

# SGD: Adam turns the rounding of a gradient that is zero into a full step.
_SGD = {"optim": "sgd", "learning_rate": 0.1}


class Skipped(Exception):
    """A check cannot be made here."""


class Elsewhere(Exception):
    """This rank has trained, and the first one compares."""


def _limit() -> float:
    # Relative error of the movement. A term that is left out gives above 1e-2; GPUs add up in other orders.
    return 2e-3 if torch.accelerator.is_available() else 2e-4


def _first_rank_goes_on() -> None:
    if not PartialState().is_main_process:
        raise Elsewhere  # it alone holds whole weights


def _joined(trainer: Any) -> int:
    """Let a recorded trainer hold what all ranks have recorded, on the CPU; returns the number of ranks."""

    def on_cpu(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)

    ranks = gather_object([on_cpu(trainer.windows)])
    trainer.windows = [_added_up(window) for window in zip(*ranks, strict=True)]
    for name in ("start", "states", "born"):
        if hasattr(trainer, name):
            setattr(trainer, name, on_cpu(getattr(trainer, name)))
    _first_rank_goes_on()
    return len(ranks)


def _added_up(windows: tuple[Any, ...]) -> Any:
    if isinstance(windows[0], dict):
        return {name: _added_up(tuple(window[name] for window in windows)) for name in windows[0]}
    return [batch for window in windows for batch in window]


def _bridge(folder: Path, options: dict[str, Any]) -> Outcome:
    trainer = small_trainer(folder, RecordingTrainer, **_SGD, **options)
    trainer.train()
    errors, _ = replay(trainer, world_size=_joined(trainer))
    return max(max(update.values()) for update in errors), _limit()


def _lean(folder: Path, options: dict[str, Any]) -> Outcome:
    trainer = lean_trainer(folder, **_SGD, **options)
    trainer.train()
    errors = replayed(trainer, world_size=_joined(trainer))
    return max(max(update.values()) for update, _ in errors), _limit()


def _stream(cls: Any, changes: dict[str, Any], **method: Any) -> Check:
    def check(folder: Path, options: dict[str, Any]) -> Outcome:
        model = streams.sharp_model()
        trainer = streams.make(streams.recording(cls), folder, model=model, **_SGD, **changes, **options)
        trainer.train()
        replayed = streams.replay_stream(trainer, streams.sharp_model(), world_size=_joined(trainer), **method)
        pairs = zip(trainer.states, replayed, strict=True)
        return max(movement_error(got, want, trainer.start) for got, (want, _) in pairs), _limit()

    return check


def _group(
    recorded: Callable[[], Any], loss: Callable[[Any], Any], reads: Any = lambda args: {}, **changes: Any
) -> Check:
    """`loss(trainer)` is the reference's loss of one micro-batch, `reads(args)` what it reads beside GRPO's options."""

    def check(folder: Path, options: dict[str, Any]) -> Outcome:
        trainer = groups.group_trainer(folder, recorded(), **{**_SGD, **changes, **options})
        trainer.train()
        world = _joined(trainer)
        errors = groups.replay_group(trainer, loss(trainer), world_size=world, **reads(trainer.args))
        return max(errors), _limit()

    return check


def _relift(folder: Path, options: dict[str, Any]) -> Outcome:
    cls = group_losses.watch_buffer()
    trainer = groups.group_trainer(folder, cls, **{**_SGD, "buffer_size": 3, **options, "max_steps": 4})
    trainer.train()
    if not trainer.sft_steps:
        raise Skipped("no question was unsolved, so no SFT step was taken")
    trainer.world_size = _joined(trainer)
    errors, _ = group_losses.replay_relift(trainer)
    return max(errors), _limit()


def _grpo_loss(trainer: Any) -> Any:
    for batch in (batch for window in trainer.windows for batch in window):
        batch["expert_mask"] = batch["sft_mask"] = torch.zeros_like(batch["completion_mask"])
    return lambda p: p.policy_loss()


def _distilled(cls: Any) -> Check:
    def check(folder: Path, options: dict[str, Any]) -> Outcome:
        trainer = distillation.distillation_trainer(folder, distillation.recording(cls), **_SGD, **options)
        trainer.train()
        _joined(trainer)
        return max(distillation.replay(trainer)), _limit()

    return check


def _lightning(folder: Path, options: dict[str, Any]) -> Outcome:
    trainer = lightning.make(folder, cls=lightning.recording, **options)
    trainer.train()
    _joined(trainer)
    replayed = lightning.replay(lightning.student(), trainer.start, trainer.windows, trainer.args.learning_rate)
    pairs = zip(trainer.states, replayed, strict=True)
    return max(movement_error(got, want, trainer.start) for got, (want, _) in pairs), _limit()


def _two_stage(folder: Path, options: dict[str, Any]) -> Outcome:
    """Against TRL's own SFT and GRPO one after the other."""
    stage: dict[str, Any] = {
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    config = small_config(folder / "both", TwoStageConfig, padding_free=False, **options,
                          **{f"sft_{name}": value for name, value in stage.items()})  # fmt: skip
    data = {"reward_funcs": digits_reward, "train_dataset": rl_rows()}
    both = TwoStageTrainer(
        model=small_model(), args=config, sft_dataset=sft_rows(), processing_class=tiny_tokenizer(), **data
    )
    both.train()
    both.save_model()
    shared = {name: getattr(config, name) for name in ("seed", "use_cpu", "report_to", "save_strategy")}
    args = SFTConfig(str(folder / "sft"), max_length=1024, bf16=False, gradient_checkpointing=False, **stage, **shared)
    sft = SFTTrainer(model=small_model(), args=args, train_dataset=sft_rows(), processing_class=tiny_tokenizer())
    sft.train()
    sft.save_model(str(folder / "sft"))
    sft.accelerator.wait_for_everyone()
    args = small_config(folder / "grpo", GRPOConfig, **options)
    grpo = GRPOTrainer(model=str(folder / "sft"), args=args, **data)
    grpo.train()
    grpo.save_model(str(folder / "grpo"))
    _first_rank_goes_on()
    ends = _saved(folder / "both"), _saved(folder / "grpo")
    return movement_error(*ends, small_model().state_dict()), _limit()


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Theta, the coordinator and the shadow, whole and on the CPU."""
    parts = {
        "theta": trainer.theta_state_dict(),
        "w": trainer.coordinator_state_dict(),
        "hat": trainer.shadow_state_dict(),
    }
    return {
        f"{part}.{name}": value.detach().cpu().clone() for part, held in parts.items() for name, value in held.items()
    }


def _resume(folder: Path, options: dict[str, Any]) -> Outcome:
    """A run that was stopped after its second update and resumed, against one that was not."""
    saving = {**options, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    straight = small_trainer(folder / "straight", **saving)
    start = _weights(straight)
    straight.train()
    small_trainer(folder / "halves", callbacks=[StopAt(2)], **saving).train()
    resumed = small_trainer(folder / "halves", **saving)
    resumed.train(resume_from_checkpoint=True)
    ends = _weights(resumed), _weights(straight)
    _first_rank_goes_on()
    # To the bit where sums are added up in one order.
    return movement_error(*ends, start), 1e-5 if torch.accelerator.is_available() else 0.0


def _packed(folder: Path, options: dict[str, Any]) -> Outcome:
    """One update without padding against the same one with it."""
    ends = []
    for packed in (False, True):
        trainer = small_trainer(folder / str(packed), padding_free=packed, **_SGD, **{**options, "max_steps": 1})
        start = _weights(trainer)
        trainer.train()
        ends.append(_weights(trainer))
    if not trainer._packs:
        raise Skipped("`padding_free` stands aside here (the log says why)")
    _first_rank_goes_on()
    return movement_error(ends[1], ends[0], start), _limit()


def _vllm(folder: Path, options: dict[str, Any]) -> Outcome:
    """The engine's weights against the policy's, after a training that moved it and a sync."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise Skipped("one process only")
    tiny_model(tiny_tokenizer(), hidden_size=64, heads=2, layers=2).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    trainer = small_trainer(
        folder, BridgeTrainer, model=str(folder / "model"), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.1, model_init_kwargs={"dtype": "float32"}, **_SGD, **options,
    )  # fmt: skip
    start = _weights(trainer)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    if movement_error(start, _weights(trainer), dict.fromkeys(start, torch.zeros(()))) == 0:
        raise RuntimeError("the policy has not moved, so that a sync would not show")
    return _largest_difference(trainer), 0.0


def _largest_difference(trainer: Any) -> float:
    engine = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    policy = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    worst = 0.0
    for name, held in engine.named_parameters():
        key = next((key for key in fused if key in name), "")
        want = torch.cat([policy[name.replace(key, part) if key else name] for part in fused.get(key, ("",))])
        # In the engine's precision; it pads the vocabulary.
        worst = max(worst, float((held[: len(want)].cpu() - want.detach().to(held.dtype).cpu()).abs().max()))
    return worst


def _contract(folder: Path, options: dict[str, Any]) -> Outcome:
    moved = [*breaches(), *breaches(*LATE)]
    if moved:
        raise RuntimeError("; ".join(moved))
    return 0.0, 0.0


def _expert(cls: Any) -> Callable[[], Any]:
    return lambda: groups.recording(cls)


_HINTS = {"train_dataset": groups.hint_rows(), "max_completion_length": 10}
_HALF = {"train_dataset": groups.expert_rows(every=2), "success_threshold": 1.0}
_TRACES = {"train_dataset": groups.trace_rows(), "max_completion_length": 14}
_TAUGHT = {
    "train_dataset": groups.hint_rows(every=2),
    "hint_template": "{prompt}{demonstration}!",
    "kl_weight": 5.0,
    "max_completion_length": 10,
}
_GUIDED = {"train_dataset": groups.hint_rows(steps=True), "hard_threshold": 1.0, "expert_max_length": 20}

CHECKS: dict[str, Check] = {
    "contract": _contract,
    "bridge": _bridge,
    "bridge, lean": _lean,
    "naive-mix": _stream(NaiveMixTrainer, {"sft_weight": 0.5}, sft_weight=lambda step: 0.5),
    "alternating": _stream(AlternatingTrainer, {}),
    "chord": _stream(
        CHORDTrainer, {"mu_peak": 0.8, "mu_valley": 0.8, "enable_phi_function": True},
        rl_weight=lambda step: 1 - 0.8, sft_weight=lambda step: 0.8, token_weight=lambda p: p * (1 - p),
    ),
    "luffy": _group(_expert(LUFFYTrainer), lambda trainer: group_losses.luffy_loss()),
    "srft": _group(_expert(SRFTTrainer), lambda trainer: group_losses.srft_loss(), **_HALF),
    "hpt": _group(_expert(HPTTrainer), lambda trainer: group_losses.hpt_loss(), gate=1, gate_off=2, **_HALF),
    "relift": _relift,
    "uft": _group(
        _expert(UFTTrainer), lambda trainer: group_losses.uft_loss, lambda args: {"hint_coef": args.hint_coef},
        hint_coef=0.7, hint_steps=3, **_HINTS,
    ),
    "prefix-rft": _group(
        _expert(PrefixRFTTrainer), lambda trainer: group_losses.prefix_loss,
        lambda args: {"share": args.prefix_entropy_quantile, "delta": args.delta}, **_TRACES,
    ),
    "ada-prefix": _group(
        _expert(AdaPrefixTrainer), lambda trainer: lambda p: p.policy_loss(), success_threshold=1.0, **_TRACES,
    ),
    "actguide": _group(
        group_losses.watch_guidance, group_losses.guide_loss,
        lambda args: {"delta": args.delta, "gamma": args.shaping_gamma}, **_GUIDED,
    ),
    "self-teacher": _group(
        _expert(SelfTeacherTrainer),
        lambda trainer: group_losses.self_teacher_loss(trainer.args, weight=trainer.args.kl_weight, gate=True), **_TAUGHT,
    ),
    "opd": _distilled(OPDTrainer),
    "aopd": _distilled(AOPDTrainer),
    "two-stage": _two_stage,
    "lightning-opd": _lightning,
    "grpo": _group(_expert(PackedGRPOTrainer), _grpo_loss, train_dataset=rl_rows()),
    "exact resume": _resume,
    "packed step": _packed,
    "vllm sync": _vllm,
}  # fmt: skip
"""By name, in the order of the table: every method of the catalogue but TRL's own SFT, and what all of them share."""
