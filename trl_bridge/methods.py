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
    "sft": "demonstrations",
}
"""What a method reads, by family. The family decides which script arguments a method has."""


class Method(NamedTuple):
    """
    A training method.

    Attributes:
        name (`str`):
            Verb on the command line.
        trainer (`str`):
            Dotted path of the trainer.
        config (`str`):
            Dotted path of its config.
        family (`str`):
            Key of [`FAMILIES`].
        summary (`str`):
            One line for `trl-bridge --help`.
    """

    name: str
    trainer: str
    config: str
    family: str
    summary: str

    @property
    def module(self) -> str:
        """Module that `accelerate launch -m` starts."""
        return f"trl_bridge.scripts.{self.name.replace('-', '_')}"


_ALL = (
    Method("bridge", "trl_bridge.BridgeTrainer", "trl_bridge.BridgeConfig", "bridge", "BRIDGE: SFT supervises RL"),
    Method("grpo", "trl.GRPOTrainer", "trl.GRPOConfig", "rl", "TRL's GRPO"),
    Method("sft", "trl.SFTTrainer", "trl.SFTConfig", "sft", "TRL's SFT"),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All methods by name."""
