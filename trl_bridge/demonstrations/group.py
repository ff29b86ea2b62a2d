"""Expert traces of RL rows: the `expert` column as tokens, and which trace a group of rollouts gets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from .render import completion_of, render_demonstrations
from .rows import prompt_key, without_none
from .steps import read_steps, step_ends
from .stream import PromptIndex, fingerprint, generator
from .tools import Schemas, with_arguments


logger = get_logger(__name__)

# Told apart from the generators of the stream and of the choice among several traces, which take the same numbers.
_USE = 1
# Far from the purposes that methods number from 2.
_OTHER = 1000


class Experts:
    """
    Expert traces of an RL dataset's prompts, as completion tokens with exactly one EOS.

    Which trace a group gets depends on nothing but the seed, the number of the generation batch and the number of the
    group in it, so that every rank and a resumed run find the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        eos_token_id: Sequence[int],
        max_length: int,
        overlong: str,
        seed: int,
        steps: bool = False,
        tools: Schemas | None = None,
    ):
        if not isinstance(dataset, Dataset):
            raise TypeError(
                "`train_dataset` must be a `datasets.Dataset` where its `expert` column is used, got "
                f"`{type(dataset).__name__}`: the traces are rendered and checked before training."
            )
        traces, rows = expert_rows(dataset)
        rendered = render_demonstrations(
            traces,
            processing_class,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            eos_token_id=eos_token_id,
            source="train_dataset",
            source_rows=rows,
            tools=tools,
        )
        self.seed = seed
        self.max_length = max_length
        self.fingerprint = fingerprint(rendered)
        self.has_steps = steps and "expert_steps" in dataset.column_names
        if self.has_steps:
            ends = _step_ends(rendered, read_steps(dataset, traces, rows), processing_class)
            rendered = rendered.add_column("step_ends", ends, feature=List(Value("int64")))
        self._of_turns = _traces_of_turns(rendered, traces)
        self._rendered = _limit_length(rendered, max_length, overlong)
        self._index = PromptIndex(self._rendered["prompt_key"][:], seed)

    def draw(self, prompt: Any, generation: int, group: int, probability: float = 1.0) -> list[int] | None:
        """The trace of a group of rollouts."""
        key = prompt_key(prompt)
        if self._index.missing([key]):
            return None
        if probability < 1.0 and self.uniform(generation, group, _USE) >= probability:
            return None
        row = self._rendered[self._index.draw(key, generation, group)]
        return _completion(row)[: self.max_length]

    def own(self, trace: Sequence[int]) -> list[bool]:
        """Which tokens of a trace the expert has written: all but the results of tools."""
        known = self._of_turns.get(tuple(trace))
        return [True] * len(trace) if known is None else known.own

    def messages(self, trace: Sequence[int]) -> list[dict[str, Any]] | None:
        """The turns of a trace in which tools answer; `None` of any other."""
        known = self._of_turns.get(tuple(trace))
        return None if known is None else known.messages

    @property
    def first_row_of_turns(self) -> int | None:
        """The first row of the dataset with a trace in which tools answer."""
        return min((known.row for known in self._of_turns.values()), default=None)

    def draw_other(self, prompt: Any, generation: int, group: int) -> list[int] | None:
        """The trace of another prompt, for controls."""
        key, keys = prompt_key(prompt), self._rendered["prompt_key"][:]
        start = int(self.uniform(generation, group, _OTHER) * len(keys))
        row = next((row for row in (*range(start, len(keys)), *range(start)) if keys[row] != key), None)
        return None if row is None else _completion(self._rendered[row])[: self.max_length]

    def step_ends(self, prompt: Any, generation: int, group: int) -> list[int]:
        """Where the steps of a group's trace end."""
        if not self.has_steps:
            return []
        return self._rendered[self._index.draw(prompt_key(prompt), generation, group)]["step_ends"]

    def uniform(self, generation: int, group: int, purpose: int) -> float:
        """A number in [0, 1) of a group's own, the same on every rank and after a resume."""
        return float(torch.rand((), generator=generator(self.seed, generation, group, purpose)))


class _Turns(NamedTuple):
    row: int
    own: list[bool]
    messages: list[dict[str, Any]]


def _traces_of_turns(rendered: Dataset, traces: Dataset) -> dict[tuple[int, ...], _Turns]:
    """Traces in which tools answer, by their tokens."""
    found = {}
    for index, labels in enumerate(rendered["labels"]):
        first = next(place for place, label in enumerate(labels) if label != -100)
        # Rows and messages are read for these alone: most datasets have none.
        if -100 in labels[first:]:
            row = rendered[index]
            ids, own = completion_of(row)
            messages = with_arguments(without_none(traces[index]["completion"]), "`train_dataset`")
            found[tuple(ids)] = _Turns(row["row"], own, messages)
    return found


def expert_rows(dataset: Dataset) -> tuple[Dataset, list[int]]:
    """One row of `prompt` and `completion` for each trace of an RL dataset."""
    if "prompt" not in dataset.column_names:
        raise ValueError(f"`train_dataset` has no `prompt` column (its columns: {sorted(dataset.column_names)}).")
    if "expert" not in dataset.column_names:
        raise ValueError(
            f"`train_dataset` has no `expert` column (its columns: {sorted(dataset.column_names)}). Add one with a "
            "worked solution for each prompt: a string, a list of messages, or a list of either."
        )
    prompts, completions, rows = [], [], []
    for row, (prompt, expert) in enumerate(zip(dataset["prompt"], dataset["expert"], strict=True)):
        for trace in _traces(expert):
            if isinstance(prompt, list) and isinstance(trace, str):
                trace = [{"role": "assistant", "content": trace}]
            if isinstance(prompt, str) and not isinstance(trace, str):
                raise ValueError(
                    f"`train_dataset` row {row}: `prompt` is a string, so `expert` must be one too, not messages."
                )
            prompts.append(prompt)
            completions.append(trace)
            rows.append(row)
    if not rows:
        raise ValueError("No row of `train_dataset` has an `expert`: the column is empty.")
    return Dataset.from_dict({"prompt": prompts, "completion": completions}), rows


def _traces(expert: Any) -> list[Any]:
    """The traces in one cell of the column."""
    if not expert:
        return []
    if isinstance(expert, str) or (isinstance(expert[0], dict)):
        return [expert]
    return [trace for trace in expert if trace]


def _completion(row: dict[str, Any]) -> list[int]:
    return completion_of(row)[0]


def _step_ends(rendered: Dataset, steps: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ends = []
    for row, parts in zip(rendered, steps, strict=True):
        try:
            ends.append(step_ends(_completion(row)[:-1], parts, tokenizer) if parts else [])
        except ValueError as error:
            raise ValueError(f"`train_dataset` row {row['row']}: {error}") from error
    return ends


def _limit_length(rendered: Dataset, max_length: int, overlong: str) -> Dataset:
    lengths = [len(_completion(row)) for row in rendered]
    too_long = [index for index, length in enumerate(lengths) if length > max_length]
    if not too_long:
        return rendered
    count = f"{len(too_long)} of {len(lengths)} traces in the `expert` column of `train_dataset`"
    first = f"the first is in row {rendered[too_long[0]]['row']} with {lengths[too_long[0]]} tokens"
    if overlong == "error":
        raise ValueError(
            f"{count} are longer than {max_length} tokens ({first}). Raise `expert_max_length` or "
            "`max_completion_length`, or set `expert_overlong` to 'skip' or 'truncate'."
        )
    PartialState()  # accelerate's logger, which speaks on one rank only, needs it
    if overlong == "truncate":
        for index in too_long:
            if not all(completion_of(rendered[index])[1]):
                raise ValueError(
                    f"`train_dataset` row {rendered[index]['row']}: the trace in `expert` has {lengths[index]} tokens, more than {max_length}, and "
                    "one in which tools answer cannot be cut. Raise `max_completion_length`, or set `expert_overlong='skip'`."
                )
        logger.warning(f"{count} are longer than {max_length} tokens and are cut, so they do not end ({first}).")
        return rendered
    if len(too_long) == len(lengths):
        raise ValueError(
            f"Every trace in the `expert` column of `train_dataset` is longer than {max_length} tokens ({first}). "
            "Raise `expert_max_length` or `max_completion_length`."
        )
    logger.warning(f"{count} are longer than {max_length} tokens: their prompts train without expert ({first}).")
    return rendered.select([index for index, length in enumerate(lengths) if length <= max_length])
