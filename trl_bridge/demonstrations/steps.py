"""Steps of expert traces: the `expert_steps` column, where its steps end in tokens, and pieces made of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def piece_ends(step_ends: Sequence[int], pieces: int) -> list[int]:
    """Group the steps of a trace into pieces of about equally many steps."""
    n = min(pieces, len(step_ends))
    return [0, *(step_ends[round(piece / n * len(step_ends)) - 1] for piece in range(1, n + 1))]


def read_steps(dataset: Dataset, traces: Dataset, rows: Sequence[int]) -> list[list[str]]:
    """The `expert_steps` column, checked against the traces."""
    column = dataset["expert_steps"]
    counts, places = Counter(rows), Counter[int]()
    found = []
    for row, completion in zip(rows, traces["completion"], strict=True):
        cell = column[row] or []
        cell = [cell] if cell and isinstance(cell[0], str) else [steps for steps in cell if steps]
        if cell and len(cell) != counts[row]:
            raise ValueError(
                f"`train_dataset` row {row} has {counts[row]} traces in `expert` and steps for {len(cell)} in "
                "`expert_steps`. Give one list of steps for each trace."
            )
        steps = [step for step in cell[places[row]] if step] if cell else []
        places[row] += 1
        if steps and "".join(steps) != _text(completion):
            raise ValueError(
                f"`train_dataset` row {row}: the strings of `expert_steps` do not join to the text of `expert`. They "
                "must be the text itself, cut up (keep blanks and line breaks at the end of a step)."
            )
        found.append(steps)
    return found


def _text(completion: Any) -> str | None:
    """Text of a trace that is a string or one message."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        return None
    content = completion[0].get("content")
    if isinstance(content, list) and len(content) == 1:
        content = content[0].get("text")
    return content if isinstance(content, str) else None


def step_ends(token_ids: list[int], steps: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Where the steps of a trace end in its tokens.

    The tokens stay as they are: they are decoded one by one and their text is laid along the steps', by what is not
    white space, so that a chat template may put something before the text or change white space. A token that lies
    across the end of a step goes with it if it holds any of its text, and with the next step if it holds no more of it
    than white space. No step ends inside a character.
    """
    boundaries = _boundaries(token_ids, tokenizer)
    before = "".join(boundary.text for boundary in boundaries).find(_solid("".join(steps)))
    if before < 0:
        raise ValueError(
            "the text of `expert_steps` is not in the rendered trace: the chat template changes it. Set "
            "`processing_class.chat_template` to one that keeps it, or remove the column."
        )
    ends, place, target, trailing = [], 0, before, 0
    for step in steps[:-1]:
        target += len(_solid(step))
        trailing = _trailing(step, trailing)
        while boundaries[place].solid < target:
            place += 1
        for following in boundaries[place + 1 :]:
            if following.solid > target or following.blank > trailing:
                break
            place += 1
        ends.append(boundaries[place].tokens)
    return [*ends, len(token_ids)]


class _Boundary(NamedTuple):
    """A place between two tokens that lies between two characters."""

    tokens: int
    text: str
    solid: int
    blank: int


def _boundaries(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[_Boundary]:
    boundaries = [_Boundary(0, "", 0, 0)]
    for count, text in enumerate(_added_texts(token_ids, tokenizer), start=1):
        if text is not None:
            last, solid = boundaries[-1], _solid(text)
            boundaries.append(_Boundary(count, solid, last.solid + len(solid), _trailing(text, last.blank)))
    return boundaries


def _trailing(text: str, before: int) -> int:
    """White space at the end of a text that comes after `before` characters of white space."""
    return len(text) - len(text.rstrip()) if text.strip() else before + len(text)


def _solid(text: str) -> str:
    return "".join(text.split())


def _added_texts(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """What each token adds to the decoded text; `None` while a character is not whole."""
    if tokenizer.is_fast:
        stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
        return [stream.step(backend, token) for token in token_ids]
    added: list[str | None] = []
    known = ""
    for count in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(token_ids[:count], skip_special_tokens=False))
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        added.append(text[len(known) :] if whole else None)
        known = text if whole else known
    return added
