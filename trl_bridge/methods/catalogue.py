"""
The one list of training methods: name, trainer, config and family.

Strings only, so that reading it imports no torch. A new method is one line here and its thin module in
`trl_bridge/scripts/`, which the launcher starts.
"""

from typing import NamedTuple


__all__ = ["FAMILIES", "METHODS", "Method"]

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
    """A training method."""

    name: str
    trainer: str
    config: str
    family: str
    summary: str
    place: str


_ALL = (
    Method(
        "bridge",
        "trl_bridge.BridgeTrainer",
        "trl_bridge.BridgeConfig",
        "bridge",
        "BRIDGE: SFT supervises RL",
        "off-policy",
    ),
    Method(
        "naive-mix",
        "trl_bridge.NaiveMixTrainer",
        "trl_bridge.NaiveMixConfig",
        "stream",
        "GRPO plus a weighted SFT loss",
        "off-policy",
    ),
    Method(
        "alternating",
        "trl_bridge.AlternatingTrainer",
        "trl_bridge.AlternatingConfig",
        "stream",
        "SFT updates and GRPO updates by turns",
        "off-policy",
    ),
    Method(
        "chord",
        "trl_bridge.CHORDTrainer",
        "trl_bridge.CHORDConfig",
        "stream",
        "CHORD: SFT as an auxiliary loss that fades",
        "off-policy",
    ),
    Method(
        "luffy",
        "trl_bridge.LUFFYTrainer",
        "trl_bridge.LUFFYConfig",
        "group",
        "LUFFY: the expert as one rollout of its group",
        "off-policy",
    ),
    Method(
        "srft",
        "trl_bridge.SRFTTrainer",
        "trl_bridge.SRFTConfig",
        "group",
        "SRFT: LUFFY's expert, SFT on it and self-exploration, weighted by entropy",
        "off-policy",
    ),
    Method(
        "hpt",
        "trl_bridge.HPTTrainer",
        "trl_bridge.HPTConfig",
        "group",
        "HPT: SFT in place of RL where no rollout is right; SuperRL as a preset",
        "off-policy",
    ),
    Method(
        "relift",
        "trl_bridge.ReLIFTTrainer",
        "trl_bridge.ReLIFTConfig",
        "group",
        "ReLIFT: GRPO, and SFT steps on the questions it could not solve",
        "off-policy",
    ),
    Method(
        "uft",
        "trl_bridge.UFTTrainer",
        "trl_bridge.UFTConfig",
        "group",
        "UFT: rollouts continue a hint that gets shorter, and learn its likelihood",
        "sampling",
    ),
    Method(
        "prefix-rft",
        "trl_bridge.PrefixRFTTrainer",
        "trl_bridge.PrefixRFTConfig",
        "group",
        "Prefix-RFT: one rollout of the group continues a prefix of the expert's",
        "sampling",
    ),
    Method(
        "actguide",
        "trl_bridge.ActGuideTrainer",
        "trl_bridge.ActGuideConfig",
        "group",
        "ActGuide: groups without a success are rolled out anew with as little guidance as works",
        "sampling",
    ),
    Method(
        "opd",
        "trl_bridge.OPDTrainer",
        "trl_bridge.OPDConfig",
        "distillation",
        "OPD: the log-ratio of teacher and student as the reward of each sampled token",
        "dense",
    ),
    Method(
        "aopd",
        "trl_bridge.AOPDTrainer",
        "trl_bridge.AOPDConfig",
        "distillation",
        "AOPD: OPD, and imitation of the teacher's likeliest tokens where the student is too sure",
        "dense",
    ),
    Method(
        "two-stage",
        "trl_bridge.TwoStageTrainer",
        "trl_bridge.TwoStageConfig",
        "stream",
        "cold start: TRL's SFT, then TRL's GRPO, in one run",
        "sft",
    ),
    Method(
        "lightning-opd",
        "trl_bridge.LightningOPDTrainer",
        "trl_bridge.LightningOPDConfig",
        "scored",
        "Lightning OPD: distillation from a teacher that scored the student's rollouts once, before training",
        "dense",
    ),
    Method("grpo", "trl.GRPOTrainer", "trl.GRPOConfig", "rl", "TRL's GRPO", "critic-free"),
    Method("sft", "trl.SFTTrainer", "trl.SFTConfig", "sft", "TRL's SFT", "sft"),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All methods by name."""
