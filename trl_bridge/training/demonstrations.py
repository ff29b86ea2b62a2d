"""The demonstration stream as a trainer holds it: rendered rows, the order they come in, and their batches."""

import json
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..demonstrations.render import render_demonstrations
from ..demonstrations.rows import prompt_key
from ..demonstrations.stream import DemonstrationStream, PromptIndex, fingerprint


if TYPE_CHECKING:
    from .stream import DemonstrationTrainer


class Demonstrations:
    """Rendered demonstrations and their order."""

    def __init__(self, trainer: "DemonstrationTrainer", dataset: Dataset):
        self.trainer = trainer
        self.source = dataset
        args: Any = trainer.args
        tokenizer: Any = trainer.processing_class
        template_kwargs: Any = trainer.chat_template_kwargs
        own_eos = trainer._tokenizer.eos_token_id
        # The main process renders first, so that the others read its cache.
        with trainer.accelerator.main_process_first():
            self.rendered = render_demonstrations(
                dataset,
                tokenizer,
                chat_template=trainer.chat_template,
                chat_template_kwargs=template_kwargs,
                eos_token_id=[own_eos, *(eos for eos in trainer.eos_token_ids if eos != own_eos)],
                max_length=args.sft_max_length,
                overlong=args.sft_overlong,
            )
        self.paired = args.sft_pairing == "prompt"
        self.stream = DemonstrationStream(len(self.rendered), args.seed)
        self.fingerprint = fingerprint(self.rendered)
        self.tokens_seen = 0
        self._draws = 0
        self._source_rows = self.rendered["row"][:]
        self._index_of_row = {row: index for index, row in enumerate(self._source_rows)}
        labels = self.rendered["labels"]
        self._num_tokens = [sum(label != -100 for label in row) for row in labels]
        self._lengths = [len(row) for row in labels]
        self._collator = DataCollatorForLanguageModeling(
            pad_token_id=trainer._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
        )
        self._index = self._index_prompts() if self.paired else None

    def _index_prompts(self) -> PromptIndex:
        train_dataset: Any = self.trainer.train_dataset
        if isinstance(train_dataset, IterableDataset):
            raise NotImplementedError(
                "`sft_pairing='prompt'` needs a `train_dataset` that can be looked through beforehand, not an iterable "
                "one. Use `sft_pairing='independent'`."
            )
        index = PromptIndex(self.rendered["prompt_key"][:], self.trainer.args.seed)
        missing = index.missing(prompt_key(prompt) for prompt in train_dataset["prompt"])
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
        """Trained token ids of the demonstration that was rendered from a row of the user's dataset."""
        return [label for label in self.rendered[self._index_of_row[row]]["labels"] if label != -100]

    @property
    def epoch(self) -> float:
        """Epochs of demonstrations that have been drawn."""
        return self._draws / len(self.rendered) if self.paired else self.stream.epoch

    def pair(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        For each row of a generation batch, the demonstration that it brings along with `sft_pairing="prompt"`.

        Shapes: returns (rows,).
        """
        if self._index is None:
            return {}
        trainer: Any = self.trainer
        generation = trainer._step // (trainer.args.steps_per_generation * trainer.num_iterations)
        first_row = trainer.accelerator.process_index * len(inputs)
        indices = []
        for row, example in enumerate(inputs, start=first_row):
            group, member = divmod(row, trainer.num_generations)
            key = prompt_key(example["prompt"])
            indices.append(self._index.draw(key, generation, group) if member == 0 else -1)
        self._draws += trainer.args.generation_batch_size // trainer.num_generations
        return {"demonstration_index": torch.tensor(indices, device=trainer.accelerator.device)}

    def batch(self, share: list[int]) -> dict[str, torch.Tensor]:
        """
        Collate demonstrations.

        Shapes: returns (B, T).
        """
        # Every rank runs the same passes: a micro-batch without a demonstration runs one that trains on nothing.
        examples = [self.rendered[index] for index in share or [0]]
        features = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
        batch = dict(self._collator(features))
        if not share:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        device = self.trainer.accelerator.device
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}

    def state_dict(self) -> dict[str, Any]:
        """Position of the stream and running counts."""
        return {"stream": self.stream.state_dict(), "tokens_seen": self.tokens_seen, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.stream.load_state_dict(state["stream"])
        self.tokens_seen = state["tokens_seen"]
        self._draws = state["draws"]
