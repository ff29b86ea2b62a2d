"""What a trainer with a demonstration stream keeps from an update's first micro-batch to its last."""

import dataclasses

import torch


@dataclasses.dataclass
class Window:
    """
    One accumulation window: the micro-batches that make up an optimizer update.

    Attributes:
        shares (`list[list[int]]`):
            For each micro-batch, the demonstrations of this rank (indices into the rendered dataset).
        num_tokens (`int`):
            Trained demonstration tokens of the whole window over all ranks.
        micro_batch (`int`):
            Number of micro-batches done.
        sums (`dict[str, torch.Tensor]`):
            Running sums on this rank: the RL loss, and those of the SFT pass (see
            [`objectives.sft.demonstration_loss`]).
        weighted (`bool`):
            Whether the demonstrations' tokens were weighed.
    """

    shares: list[list[int]]
    num_tokens: int
    micro_batch: int = 0
    sums: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    weighted: bool = False

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        """Add one pass's sums to the running ones."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
