"""Rows of scored rollouts as the trainer reads them, and their batches."""

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .._upstream import DataCollatorForLanguageModeling
from ..data.files import code_of, warn
from ..demonstrations.rows import python_rows
from . import scoring
from .identity import check_identity, parsed
from .scoring import Rollout, check_scores


SCORES = ("teacher_logprobs", "reference_logprobs")
"""Columns with one number for each token of a row; the second one may be absent."""

_NEEDED = ("prompt_ids", "completion_ids", "teacher_logprobs", "scored_with")


def scored_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    require_same_teacher: bool,
    max_length: int | None = None,
    num_proc: int | None = None,
    what: str = "train_dataset",
) -> tuple[Dataset, list[dict[str, Any]]]:
    """Check the rows that `trl-bridge data score-rollouts` writes, and lay them out as tokens, labels and scores."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{what}` must be a `Dataset`, whose rows can be checked, got {type(dataset).__name__}.")
    missing = [name for name in _NEEDED if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{what}` has no column {', '.join(map(repr, missing))}; it has: {', '.join(dataset.column_names)}. Make the "
            "rows with `trl-bridge data score-rollouts`."
        )
    if not len(dataset):
        raise ValueError(f"`{what}` is empty.")
    dataset = python_rows(dataset)
    identities = check_identity(list(dict.fromkeys(dataset["scored_with"])), tokenizer, require_same_teacher, what)
    names = [name for name in SCORES if name in dataset.column_names]
    with PartialState().main_process_first():
        rows = dataset.map(
            _lay_out,
            with_indices=True,
            fn_kwargs={
                "names": names,
                "max_length": max_length,
                "what": what,
                **code_of(sys.modules[__name__], scoring),
            },
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc=f"Laying out {what}",
        ).with_format(None)
        kept = rows.filter(
            lambda row: row["labels"][-1] != -100, num_proc=num_proc, desc="Dropping rows cut to prompts"
        )
    if not len(kept):
        raise ValueError(f"every prompt of `{what}` fills `max_length={max_length}` alone.")
    if len(kept) < len(rows):
        warn(
            f"{len(rows) - len(kept)} of {len(rows)} rows of `{what}` have no completion within `max_length={max_length}`."
        )
    return kept, identities


def check_complete(dataset: Dataset, what: str) -> None:
    """Refuse a file of scored rollouts that was cut: each row says how many were written with it."""
    for text, count in Counter(dataset["scored_with"] if "scored_with" in dataset.column_names else ()).items():
        written = parsed(text, what).get("rows", count)
        if count < written:
            raise ValueError(
                f"`{what}` holds {count} of the {written} rows that were written: the file was cut. Make it again with `trl-bridge "
                "data score-rollouts`, which goes on from what it has on disk."
            )


def check_tokens(dataset: Any, vocabulary: int, what: str) -> None:
    """Refuse token ids that the model has no embedding of."""
    for name, part in dataset.items() if isinstance(dataset, Mapping) else ():
        check_tokens(part, vocabulary, f"{what} ({name})")
    for column in ("prompt_ids", "completion_ids"):
        if not isinstance(dataset, Dataset) or column not in dataset.column_names:
            continue
        for index, ids in enumerate(dataset.with_format("numpy", columns=[column])[column]):
            outside = ids[(ids < 0) | (ids >= vocabulary)]
            if len(outside):
                raise ValueError(
                    f"row {index} of `{what}` has the token id {outside[0]} in `{column}`, and the model's vocabulary has "
                    f"{vocabulary}. Make the rows with the tokenizer of the model that is trained."
                )


def rows_hash(rows: Dataset) -> str:
    """
    Hash of what rows hold, in their order: a resumed run reads the same ones, wherever they were read from.
    """
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels", *SCORES):
            if name in rows.column_names:
                column = batch[name].combine_chunks()
                digest.update(f"{name} {column.value_lengths().to_pylist()}".encode())
                kind = np.float32 if name in SCORES else np.int64
                digest.update(column.flatten().to_numpy(zero_copy_only=False).astype(kind).tobytes())
    return digest.hexdigest()[:16]


def _lay_out(
    row: dict[str, Any], index: int, names: list[str], max_length: int | None, what: str, code: str
) -> dict[str, Any]:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    where = f"row {index} of `{what}`"
    if not prompt:
        raise ValueError(f"{where} has an empty prompt.")
    made = {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
    for name in names:
        check_scores(Rollout(prompt, completion), row[name], f"{where}, `{name}`:")
        made[name] = [0.0] * len(prompt) + row[name]
    return {name: values[:max_length] for name, values in made.items()}


class ScoredCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the scores padded beside the tokens: `(B, L)`, 0 at prompts and padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for name in SCORES:
            if name in examples[0]:
                padded = torch.zeros(batch["input_ids"].shape, dtype=torch.float32)
                for row, example in zip(padded, examples, strict=True):
                    row[: len(example[name])] = torch.tensor(example[name])
                batch[name] = padded
        return batch
