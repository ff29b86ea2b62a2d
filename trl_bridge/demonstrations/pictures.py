"""Rows with pictures: the columns `image` and `images` as TRL reads them, and which rows cannot be trained on."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.data_utils import prepare_multimodal_messages


COLUMNS = ("image", "images")


def pictures_of(example: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row."""
    if "images" in example:
        return list(example["images"] or [])
    return [] if example.get("image") is None else [example["image"]]


def with_pictures(messages: list[dict[str, Any]], pictures: list[Any], row: str) -> list[dict[str, Any]]:
    """Messages as a processor takes them: TRL's own, with the row in what it says of a wrong number of pictures."""
    for part in (part for m in messages if isinstance(m.get("content"), list) for part in m["content"]):
        if part.get("type") == "image" and any(part.get(name) for name in ("image", "url", "path", "base64")):
            raise ValueError(f"{row}: a message holds its picture itself. Put it into a column `images`.")
    # Where rows differ, Arrow has filled the fields of one kind of part into the other.
    parts = [
        {**m, "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
        if isinstance(m.get("content"), list)
        else m
        for m in messages
    ]
    try:
        return prepare_multimodal_messages(parts, images=pictures)
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


def check_pictures(dataset: Any, what: str) -> None:
    """
    Refuse rows whose pictures cannot be read, or do not fit their prompt. A stream and what a transform makes of rows cannot
    be looked through beforehand.
    """
    for name, part in dataset.items() if isinstance(dataset, Mapping) else ():
        check_pictures(part, f"{what}[{name!r}]")
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if set(COLUMNS) <= set(dataset.column_names):
        raise ValueError(f"`{what}` has both `image` and `images`, of which TRL reads the second. Remove one of them.")
    for row, column, stored in _stored(dataset):
        pictures = stored if column == "images" else [stored]
        if pictures is None or (column == "image" and stored is None):
            # TRL hands the processor a `None`, in whose place it expects a list.
            raise ValueError(
                f"`{what}` row {row}: `{column}` is null. Use a column `images`, with an empty list where there is no picture."
            )
        for picture in pictures:
            fault = _fault(picture)
            if fault is not None:
                raise ValueError(f"`{what}` row {row}: `{column}` {fault}. Correct the row, or remove it.")
    _check_prompts(dataset, what)


def check_each_has_one(dataset: Any, what: str) -> None:
    """
    Refuse rows without a picture where several processes train: one that runs no vision tower would leave the others waiting.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        seeing = {row for row, _, stored in _stored(dataset) if stored}
        first = next((row for row in range(len(dataset)) if row not in seeing), None)
        if first is not None:
            raise NotImplementedError(
                f"`{what}` row {first} has no picture, and on several processes each row needs one: the processes run the vision tower "
                "together. Remove such rows, or launch it on one device."
            )


def _stored(dataset: Dataset) -> Iterator[tuple[int, str, Any]]:
    """Row, column and what is stored there: no picture is decoded."""
    for column in set(COLUMNS) & set(dataset.column_names):
        row = 0
        for batch in dataset.select_columns([column]).with_format("arrow").iter(100):
            for value in batch[column].to_pylist():
                yield row, column, value
                row += 1


def _fault(picture: Any) -> str | None:
    """Why a stored picture cannot be read."""
    from PIL import Image

    stored: Any = {"path": picture} if isinstance(picture, str) else picture
    if not isinstance(stored, Mapping) or not (stored.get("bytes") or stored.get("path")):
        return f"holds no picture, but {picture!r}"
    content: Any = stored.get("bytes")
    source: Any = io.BytesIO(content) if content else stored["path"]
    if isinstance(source, str):
        if "://" in source or source.startswith("data:"):
            return None  # fetched when it is needed
        if not Path(source).is_file():
            return f"names {source}, which does not exist"
    try:
        with Image.open(source) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end all the same, at an eighth of the size
            image.load()
    except (OSError, SyntaxError) as error:
        return f"holds no picture that can be read ({error})"
    return None


def _check_prompts(dataset: Dataset, what: str) -> None:
    """Of the rows with pictures."""
    if "prompt" not in dataset.column_names:
        return
    counts = {row: 1 if column == "image" else len(value) for row, column, value in _stored(dataset)}
    for row, prompt in enumerate(dataset.with_format(None)["prompt"]):
        if counts.get(row) and isinstance(prompt, str):
            raise ValueError(
                f"`{what}` row {row} has a picture, and its `prompt` is a string: write it as messages, which the processor's "
                "template can put the picture into."
            )
        if isinstance(prompt, list):
            with_pictures(prompt, [None] * counts.get(row, 0), f"`{what}` row {row}")
