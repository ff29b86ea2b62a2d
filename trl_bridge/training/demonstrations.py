"""The demonstration stream: rendered rows, the order they come in, and their batches."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset

from .._upstream import DataCollatorForLanguageModeling
from ..demonstrations.render import completion_of
from ..demonstrations.rows import prompt_key
from ..demonstrations.stream import DemonstrationStream, PromptIndex, fingerprint


class Demonstrations:
    """Rendered demonstrations and their order: by prompt where RL's prompts are given, else a shuffled stream."""

    def __init__(
        self,
        source: Dataset,
        rendered: Dataset,
        *,
        seed: int,
        collator: DataCollatorForLanguageModeling,
        device: torch.device,
        prompts: Iterable[Any] | None = None,
        picture_inputs: Callable[[list[dict[str, Any]], int], dict[str, torch.Tensor]] | None = None,
    ):
        self.source = source
        self.rendered = rendered
        self.paired = prompts is not None
        self.stream = DemonstrationStream(len(rendered), seed)
        self.fingerprint = fingerprint(rendered)
        self.tokens_seen = 0
        self._draws = 0
        self._source_rows = rendered["row"][:]
        self._index_of_row = {row: index for index, row in enumerate(self._source_rows)}
        labels = rendered["labels"]
        self._num_tokens = [sum(label != -100 for label in row) for row in labels]
        self._lengths = [len(row) for row in labels]
        self._collator = collator
        self._picture_inputs = picture_inputs
        self._device = device
        self._index = None if prompts is None else self._index_prompts(prompts, seed)

    def _index_prompts(self, prompts: Iterable[Any], seed: int) -> PromptIndex:
        index = PromptIndex(self.rendered["prompt_key"][:], seed)
        missing = index.missing(prompt_key(prompt) for prompt in prompts)
        if missing:
            raise ValueError(
                f"`sft_pairing='prompt'`: `sft_dataset` has no demonstration for {len(missing)} of the prompts in "
                f"`train_dataset`; the first is {json.loads(missing[0])!r}. Add demonstrations, filter "
                "`train_dataset`, or use `sft_pairing='independent'`."
            )
        return index

    def num_tokens(self, index: int) -> int:
        """Trained tokens of one demonstration."""
        return self._num_tokens[index]

    def by_length(self, drawn: list[int]) -> list[int]:
        """Demonstrations from the shortest to the longest, so that those of a micro-batch need little padding."""
        return sorted(drawn, key=lambda index: self._lengths[index])

    def rows(self, share: list[int]) -> list[int]:
        """Rows of the user's dataset that demonstrations were rendered from."""
        return [self._source_rows[index] for index in share]

    def completion_ids(self, row: int) -> list[int]:
        """Token ids of the completion of the demonstration that was rendered from a row of the user's dataset."""
        return completion_of(self.rendered[self._index_of_row[row]])[0]

    @property
    def epoch(self) -> float:
        """Epochs of demonstrations that have been drawn."""
        return self._draws / len(self.rendered) if self.paired else self.stream.epoch

    def pair(
        self, prompts: Sequence[Any], places: Sequence[tuple[int, int]], generation: int, num_groups: int
    ) -> dict[str, torch.Tensor]:
        """
        For each row of a generation batch, by its group and place in it, the demonstration that it brings along.

        Shapes: returns (rows,).
        """
        if self._index is None:
            return {}
        indices = [
            self._index.draw(prompt_key(prompt), generation, group) if member == 0 else -1
            for prompt, (group, member) in zip(prompts, places, strict=True)
        ]
        self._draws += num_groups
        return {"demonstration_index": torch.tensor(indices, device=self._device)}

    def batch(self, share: list[int]) -> dict[str, torch.Tensor]:
        """
        Collate demonstrations, with their pictures where the model sees them.

        Shapes: tokens, mask and labels (B, T).
        """
        # Every rank runs the same passes: a micro-batch without a demonstration runs one that trains on nothing.
        examples = [self.rendered[index] for index in share or [0]]
        features = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
        batch = dict(self._collator(features))
        if not share:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        if self._picture_inputs is not None:
            sources = [self.source[row] for row in self.rows(share or [0])]
            batch |= self._picture_inputs(sources, batch["input_ids"].size(1))
        return {name: value.to(self._device) for name, value in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream and running counts."""
        return {"stream": self.stream.state_dict(), "tokens_seen": self.tokens_seen, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self.stream.load_state_dict(state["stream"])
        self.tokens_seen = state["tokens_seen"]
        self._draws = state["draws"]
