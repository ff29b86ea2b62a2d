"""Rows to tokens: every SFT format of TRL, rendered as GRPO renders its prompts."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from jinja2 import TemplateError
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .pictures import pictures_of, with_pictures
from .rows import Prompt, check_dataset, prompt_key, python_rows, split_demonstration, without_none
from .tools import Schemas, check_calls, is_shown


logger = get_logger(__name__)

Made = TypeVar("Made")

OVERLONG = ("drop", "truncate", "error")
# A message's fields that a template may leave out without a word (it then trains on something else than the row says).
_SPOKEN_FIELDS = ("content", "reasoning_content", "thinking")
# Where a conversation stands.
_COLUMNS = ("completion", "messages", "conversations")


def render_demonstrations(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    eos_token_id: int | Sequence[int],
    max_length: int | None = None,
    overlong: str = "drop",
    num_proc: int | None = None,
    source: str = "sft_dataset",
    source_rows: Sequence[int] | None = None,
    tools: Schemas | None = None,
) -> Dataset:
    """
    Turn demonstrations into tokens and labels.

    The prompt's tokens are those that [`~trl.GRPOTrainer`] generates from. The completion's follow it: for
    conversations what the chat template renders after the generation prompt. Every demonstration ends in exactly one
    end-of-sequence token. Of `messages`, the last assistant message is the completion and all before it the prompt
    (what comes after it is not used); of `text`, every token but the first is trained. With tools, the completion begins
    with the first call after the user has spoken, and the assistant's turns alone are trained.
    """
    check_dataset(dataset)
    if overlong not in OVERLONG:
        raise ValueError(f"`sft_overlong` must be one of {', '.join(OVERLONG)}, got {overlong!r}.")
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"`sft_max_length` must be at least 2 (a prompt's token and a trained one), got {max_length}."
        )
    eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    renderer = Renderer(
        processing_class, chat_template, chat_template_kwargs or {}, eos_token_ids, source, source_rows, tools or {}
    )
    rendered = (
        python_rows(dataset)
        .map(
            renderer,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc="Rendering demonstrations",
        )
        .with_format(None)
    )
    if max_length is None:
        return rendered
    PartialState()  # accelerate's logger, which speaks on one rank only, needs it
    return _limit_length(rendered, max_length, overlong, num_proc)


def completion_of(rendered: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """The tokens of a rendered row from the first trained one, and which are trained: all but what tools have answered."""
    own = [label != -100 for label in rendered["labels"]]
    first = own.index(True)
    return rendered["input_ids"][first:], own[first:]


class _Written(NamedTuple):
    """
    A row as texts: its prompt, and that with ever more of the completion behind it: what is trained, or, by turns, what is
    trained and what is not. `bare` ones are strings, without a template.
    """

    row: str
    prompt: Prompt
    texts: list[str]
    bare: bool
    prompt_ids: list[int] | None = None


@dataclasses.dataclass
class Renderer:
    """Renders rows, `{"input_ids", "labels", "row", "prompt_key"}` each."""

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    source: str
    source_rows: Sequence[int] | None
    tools: Schemas = dataclasses.field(default_factory=dict)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """A batch of `map`. The first row that cannot be rendered ends it."""
        rows = []
        for row in self.rows(batch, indices):
            if isinstance(row, ValueError):
                raise row
            rows.append(row)
        return {key: [row[key] for row in rows] for key in rows[0]}

    def rows(self, batch: Mapping[str, list], indices: Sequence[int]) -> list[dict[str, Any] | ValueError]:
        """The rows of a batch of columns, or why they cannot be rendered. The tokenizer, which has threads, gets all at once."""
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        numbers = [index if self.source_rows is None else self.source_rows[index] for index in indices]
        parts = [_or_fault(self._written, *each) for each in zip(examples, numbers, strict=True)]
        written = [part for part in parts if isinstance(part, _Written)]
        ids = {
            bare: iter(self._tokenize([text for part in written if part.bare is bare for text in part.texts], bare))
            for bare in (True, False)
        }
        return [
            _or_fault(self._row, part, number, [next(ids[part.bare]) for _ in part.texts])
            if isinstance(part, _Written)
            else part
            for part, number in zip(parts, numbers, strict=True)
        ]

    def _row(self, written: _Written, number: int, joint: list[list[int]]) -> dict[str, Any]:
        before = joint[0]
        # A picture is one token of the text, and many of the processor's.
        prompt_ids = before if written.prompt_ids is None else written.prompt_ids
        ids, labels = list(prompt_ids), [-100] * len(prompt_ids)
        for place in range(1, len(joint)):
            added = self._continuation(before, joint[place], *written.texts[place - 1 : place + 1])
            is_last, is_trained = place == len(joint) - 1, place % 2 == 1
            added = self._end_once(added) if is_last else added
            # As a rollout's turn it ends where the policy stops; what the template writes behind that is not its own.
            own = len(added) if is_last else self._turns_end(added) * is_trained
            before = before + added
            ids += added
            labels += added[:own] + [-100] * (len(added) - own)
        if not prompt_ids:
            labels[0] = -100  # nothing predicts the first token of a text
        if sum(label != -100 for label in labels) < 2:
            raise _nothing_to_learn(written.row)
        return {
            "input_ids": ids,
            "labels": labels,
            "row": number,
            "prompt_key": prompt_key(written.prompt) if written.prompt else "",
        }

    def _written(self, example: dict[str, Any], number: int) -> _Written:
        row = f"`{self.source}` row {number}"
        prompt, completion = split_demonstration(example, row)
        pictures = pictures_of(example)
        if pictures and not isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"{row} has a picture, which a tokenizer cannot show the model. Pass the model's processor."
            )
        if isinstance(prompt, list) and isinstance(completion, list):
            kwargs = self._template_kwargs(example, row)
            column, advice = "expert", ""  # whose prompts are the policy's own
            if self.source_rows is None:
                column = next(name for name in _COLUMNS if name in example)
                advice = " (or `environment_factory`), or add a column `tools` with their JSON schemas"
            check_calls(prompt + completion, kwargs.get("tools") or [], f"{row}: `{column}`", advice)
            return self._conversational(prompt, completion, kwargs, row, pictures)
        if pictures:
            raise ValueError(
                f"{row} has a picture, and is written as a string: write it as messages, which the processor's template can "
                "put the picture into."
            )
        if not completion:
            raise _nothing_to_learn(row)
        return _Written(row, prompt, [str(prompt), f"{prompt}{completion}"], bare=True)

    def _conversational(
        self, prompt: list[dict], completion: list[dict], kwargs: dict[str, Any], row: str, pictures: list[Any]
    ) -> _Written:
        if self.chat_template is None and getattr(self.processing_class, "chat_template", None) is None:
            raise ValueError(
                f"{row} is conversational, but the tokenizer has no chat template. Set "
                "`processing_class.chat_template`, or use strings for `prompt` and `completion`."
            )
        if not any(value for message in completion for key, value in message.items() if key != "role"):
            raise _nothing_to_learn(row)
        spoken = [(0, len(completion))]
        if kwargs.get("tools"):
            spoken = [(turn, turn + 1) for turn, said in enumerate(completion) if said["role"] == "assistant"]
        if not spoken:
            raise _nothing_to_learn(row)
        asked, told = self._as_taken(prompt, pictures, row), self._as_taken(completion, [], row)
        texts = []
        try:
            for start, end in spoken:
                texts.append(
                    self._apply_template(asked + told[:start], add_generation_prompt=True, tokenize=False, **kwargs)
                )
                texts.append(self._apply_template(asked + told[:end], tokenize=False, **kwargs))
        except TemplateError as error:
            raise ValueError(f"{row}: the chat template refuses the conversation: {error}") from error
        _check_preserved(texts, completion, spoken, row)
        prompt_ids = self._processors_ids(asked, kwargs)
        return _Written(row, prompt, texts, bare=False, prompt_ids=prompt_ids)

    def _processors_ids(self, prompt: list[dict], kwargs: dict[str, Any]) -> list[int] | None:
        """A processor's own tokens of a prompt. Those of a tokenizer are its text's."""
        if not isinstance(self.processing_class, ProcessorMixin):
            return None
        rendered = self._apply_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs)
        return rendered["input_ids"]

    def _continuation(self, before: list[int], joint_ids: list[int], text_before: str, text: str) -> list[int]:
        # Read in its place, a completion has no word-start mark of its own (SentencePiece adds one to every text);
        # where its start merges with the prompt's end, the prompt must stay as generation sees it.
        if joint_ids[: len(before)] == before:
            return joint_ids[len(before) :]
        return self._tokenize([text.removeprefix(text_before)], special=False)[0]

    def _turns_end(self, ids: list[int]) -> int:
        """Where a turn's last EOS ends, if the template prints nothing but blanks after it."""
        ends = [position for position, token in enumerate(ids) if token in self.eos_token_ids]
        if ends and not self._tokenizer.decode(ids[ends[-1] + 1 :], skip_special_tokens=True).strip():
            return ends[-1] + 1
        return len(ids)

    def _end_once(self, ids: list[int]) -> list[int]:
        """Exactly one EOS at the end: what a template prints after the turn's last EOS goes, a missing one is added."""
        ids = ids[: self._turns_end(ids)]
        eos = self.eos_token_ids[0]
        while ids and ids[-1] in self.eos_token_ids:
            eos, ids = ids[-1], ids[:-1]
        return [*ids, eos]

    # The processing class

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        processing_class = self.processing_class
        return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class

    def _as_taken(self, messages: list[dict], pictures: list[Any], row: str) -> list[dict]:
        """Messages as the processing class takes them: GRPO hands processors structured ones."""
        is_processor = isinstance(self.processing_class, ProcessorMixin)
        return with_pictures(messages, pictures, row) if is_processor else messages

    def picture_inputs(self, examples: Sequence[Mapping[str, Any]], length: int) -> dict[str, torch.Tensor]:
        """
        What a model reads of rows beside their tokens, as TRL collates it: pixels, grids, and types of tokens, (B, length).
        """
        texts, pictures = [], []
        for example in examples:
            example = without_none(dict(example))
            prompt, _ = split_demonstration(example)
            pictures.append(pictures_of(example))
            taken = self._as_taken(prompt, pictures[-1], self.source) if isinstance(prompt, list) else prompt
            kwargs = {"add_generation_prompt": True, "tokenize": False, **self._template_kwargs(example, self.source)}
            texts.append(self._apply_template(taken, **kwargs) if isinstance(taken, list) else taken)
        output = self.processing_class(
            images=pictures if any(pictures) else None,
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=False,
        )
        longer = length - output["input_ids"].size(1)
        return {
            name: functional.pad(value, (0, longer)) if name.endswith("token_type_ids") else value
            for name, value in output.items()
            if name not in ("input_ids", "attention_mask")
        }

    def _tokenize(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(text=texts, add_special_tokens=special, return_attention_mask=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _template_kwargs(self, example: dict[str, Any], row: str) -> dict[str, Any]:
        kwargs = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        tools = example.get("tools")
        if tools:
            tools = json.loads(tools) if isinstance(tools, str) else without_none(tools)
        elif self.tools:
            name = None if None in self.tools else example.get("environment")
            if name not in self.tools:
                raise ValueError(
                    f"{row}: `environment` is {name!r}, which is none of the trainer's ({', '.join(map(str, self.tools))}). Name the "
                    "one whose tools the demonstration uses."
                )
            tools = self.tools[name]
        if tools:
            kwargs["tools"] = tools
        return {**kwargs, **without_none(example.get("chat_template_kwargs") or {})}

    def _apply_template(self, messages: list[dict], **kwargs: Any) -> Any:
        if not isinstance(self.processing_class, ProcessorMixin):
            return self.processing_class.apply_chat_template(messages, **kwargs)
        # What a processor returns has a batch dimension.
        output = self.processing_class.apply_chat_template([messages], **kwargs)
        return {key: value[0] for key, value in output.items()} if kwargs.get("return_dict") else output[0]


def _or_fault(make: Callable[..., Made], *arguments: Any) -> Made | ValueError:
    """What a function makes, or the error by which it refuses."""
    try:
        return make(*arguments)
    except ValueError as error:
        return error


def _nothing_to_learn(row: str) -> ValueError:
    return ValueError(f"{row} has no completion tokens: there is nothing to learn from it. Remove the row.")


def _check_preserved(texts: list[str], completion: list[dict], spoken: Sequence[tuple[int, int]], row: str) -> None:
    for prompt_text, text in pairwise(texts):
        if text.startswith(prompt_text):
            continue
        raise ValueError(
            f"{row}: the chat template does not keep the prompt as it is when the completion follows. The generation "
            f"prompt ends in {prompt_text[-40:]!r}, the demonstration continues differently. If the generation prompt "
            "opens a think block, begin the completion with its reasoning; if the template drops the reasoning, set "
            "`processing_class.chat_template` to one that keeps it (see `trl.get_training_chat_template`)."
        )
    shown = "".join(texts[-1].split())
    for message in completion[: spoken[-1][1]]:
        for field in _SPOKEN_FIELDS:
            value = message.get(field)
            if message["role"] == "assistant" and isinstance(value, str) and "".join(value.split()) not in shown:
                raise ValueError(
                    f"{row}: the chat template drops a part of the completion's `{field}` (often its reasoning). Set "
                    "`processing_class.chat_template` to one that keeps it (see `trl.get_training_chat_template`)."
                )
    # In the part of its own: a prompt's schemas have a call's name, and an answer may repeat a result.
    parts = [texts[0], *(text.removeprefix(before) for before, text in pairwise(texts))]
    bounds = [0, *chain.from_iterable(spoken)]
    for part, (start, end) in zip(parts, pairwise(bounds), strict=True):
        if not all(is_shown(message, part) for message in completion[start:end]):
            raise ValueError(
                f"{row}: the chat template drops the completion's tool calls or their results. Set "
                "`processing_class.chat_template` to one that supports tools."
            )


def _limit_length(rendered: Dataset, max_length: int, overlong: str, num_proc: int | None) -> Dataset:
    lengths = [len(ids) for ids in rendered["input_ids"]]
    too_long = [index for index, length in enumerate(lengths) if length > max_length]
    if not too_long:
        return rendered
    count = f"{len(too_long)} of {len(lengths)} demonstrations in `sft_dataset`"
    first = f"the first is row {rendered[too_long[0]]['row']} with {lengths[too_long[0]]} tokens"
    if overlong == "error":
        raise ValueError(
            f"{count} are longer than `sft_max_length={max_length}` ({first}). Raise `sft_max_length`, or set "
            "`sft_overlong` to 'drop' or 'truncate'."
        )
    if overlong == "truncate":
        logger.warning(f"{count} are longer than `sft_max_length={max_length}` and are cut at their end ({first}).")
        return rendered.map(
            _truncate, fn_kwargs={"max_length": max_length}, num_proc=num_proc, desc="Truncating demonstrations"
        )
    if len(too_long) == len(lengths):
        raise ValueError(
            f"Every demonstration of `sft_dataset` is longer than `sft_max_length={max_length}` ({first}). Raise "
            "`sft_max_length`, or set `sft_overlong='truncate'`."
        )
    logger.warning(f"{count} are longer than `sft_max_length={max_length}` and are dropped ({first}).")
    return rendered.select([index for index, length in enumerate(lengths) if length <= max_length])


def _truncate(example: dict[str, Any], max_length: int) -> dict[str, Any]:
    labels = example["labels"][:max_length]
    if all(label == -100 for label in labels):
        raise ValueError(
            f"`sft_dataset` row {example['row']}: nothing of the completion is left within "
            f"`sft_max_length={max_length}`. Raise it, or set `sft_overlong='drop'`."
        )
    return {"input_ids": example["input_ids"][:max_length], "labels": labels}
