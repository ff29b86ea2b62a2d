"""
The one list of training methods: name, trainer, config and family.

Strings only, so that reading it imports no torch. The verbs of the command and the names that `trl_bridge` exports come from it.
"""

from pkgutil import resolve_name
from typing import Any, NamedTuple


FAMILIES = {
    "bridge": "RL rows and demonstrations; the `lora_*` keys describe the coordinator",
    "stream": "RL rows and demonstrations",
    "group": "RL rows with an `expert` column",
    "rl": "RL rows",
    "scored": "rollouts with a teacher's scores (`trl-bridge data score-rollouts`)",
    "distillation": "prompts; a teacher (`teacher_model_name_or_path`)",
    "sft": "demonstrations",
}
"""What a method reads, by family. The family decides which script arguments a method has."""


class Method(NamedTuple):
    """A training method; trainer and config as dotted paths."""

    name: str
    trainer: str
    config: str
    family: str
    summary: str


def _ours(name: str, prefix: str, family: str, summary: str) -> Method:
    """A method of `methods/`: `{prefix}Trainer` and `{prefix}Config` of the file with its name."""
    path = f"trl_bridge.methods.{name.replace('-', '_')}.{prefix}"
    return Method(name, f"{path}Trainer", f"{path}Config", family, summary)


_ALL = (
    Method("bridge", "trl_bridge.methods.bridge.trainer.BridgeTrainer", "trl_bridge.methods.bridge.config.BridgeConfig", "bridge", "BRIDGE: SFT supervises RL"),
    _ours("naive-mix", "NaiveMix", "stream", "GRPO plus a weighted SFT loss"),
    _ours("alternating", "Alternating", "stream", "SFT updates and GRPO updates by turns"),
    _ours("chord", "CHORD", "stream", "CHORD: SFT as an auxiliary loss that fades"),
    _ours("luffy", "LUFFY", "group", "LUFFY: the expert as one rollout of its group"),
    _ours("srft", "SRFT", "group", "SRFT: LUFFY's expert, SFT on it and self-exploration, weighted by entropy"),
    _ours("hpt", "HPT", "group", "HPT: SFT in place of RL where no rollout is right; SuperRL as a preset"),
    _ours("relift", "ReLIFT", "group", "ReLIFT: GRPO, and SFT steps on the questions it could not solve"),
    _ours("uft", "UFT", "group", "UFT: rollouts continue a hint that gets shorter, and learn its likelihood"),
    _ours("prefix-rft", "PrefixRFT", "group", "Prefix-RFT: one rollout of the group continues a prefix of the expert's"),
    _ours("ada-prefix", "AdaPrefix", "group", "AdaPrefix: rollouts continue as much of the expert's as it takes to succeed half of the time"),
    _ours("actguide", "ActGuide", "group", "ActGuide: groups without a success are rolled out again with as little guidance as works"),
    _ours("self-teacher", "SelfTeacher", "group", "the policy, shown the demonstration, teaches itself without it: SDFT, SDPG, RLSD"),
    _ours("opd", "OPD", "distillation", "OPD: the log-ratio of teacher and student as the reward of each sampled token"),
    _ours("aopd", "AOPD", "distillation", "AOPD: OPD, and imitation of the teacher's likeliest tokens where the student is too sure"),
    _ours("two-stage", "TwoStage", "stream", "cold start: TRL's SFT, then TRL's GRPO, in one run"),
    _ours("lightning-opd", "LightningOPD", "scored", "Lightning OPD: distillation from a teacher that scored the student's rollouts once, before training"),
    Method("grpo", "trl_bridge.methods.packed_grpo.PackedGRPOTrainer", "trl_bridge.methods.packed_grpo.PackedGRPOConfig", "rl", "TRL's GRPO, computed without padding"),
    Method("sft", "trl.SFTTrainer", "trl.SFTConfig", "sft", "TRL's SFT"),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All methods by name."""


def import_by_path(path: str) -> Any:
    """Import what a dotted path names."""
    # With a colon: a module's own import errors are not mistaken for a name that it does not have.
    return resolve_name(":".join(path.rsplit(".", 1)))
