"""Which rows of a generation batch begin with how much of an expert's trace."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class ExpertPlan:
    """
    Rows of a generation batch on this rank, and the expert's part in them.

    Attributes:
        generation (`int`):
            Number of the generation batch.
        groups (`list[int]`):
            For each row, the number of its group over all ranks.
        members (`list[int]`):
            For each row, its place in the group, from 0.
        experts (`list[list[int] | None]`):
            For each row, its group's trace (completion tokens), or `None`.
        heads (`list[int]`):
            For each row, how many tokens of the trace it begins with; the policy writes the rest. A whole trace has
            no rest.
        inputs (`list[dict[str, Any]]`):
            The dataset's rows.
    """

    generation: int
    groups: list[int]
    members: list[int]
    experts: list[list[int] | None]
    heads: list[int]
    inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def head(self, row: int) -> list[int]:
        """The tokens that a row begins with."""
        return (self.experts[row] or [])[: self.heads[row]]

    def is_whole(self, row: int) -> bool:
        """Whether a row is the whole trace."""
        return self.heads[row] > 0 and self.heads[row] == len(self.experts[row] or [])
