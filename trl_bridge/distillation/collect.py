"""Rollouts that are sampled once and scored once, on disk after every batch: a run that is killed goes on where it stopped."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from ..data.files import write_rows
from ..generation.engines import Engine, Job, Sampling
from ..generation.records import Store
from .identity import Identity
from .scoring import Rollout, Scorer, check_scores


Record = dict[str, Any]


class Done(NamedTuple):
    """What a stage did."""

    records: list[Record]
    tokens: int
    seconds: float

    @property
    def speed(self) -> str:
        """Tokens per second, for people."""
        if not self.tokens:
            return "all there already"
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"


def sample_rollouts(
    jobs: Sequence[Job],
    engine: Callable[[], Engine],
    sampling: Sampling,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int,
) -> Done:
    """Draw one completion for each job, and keep its token ids."""

    def work() -> Callable[[Sequence[int]], Iterator[list[Record]]]:
        draw = engine()

        def batches(places: Sequence[int]) -> Iterator[list[Record]]:
            chosen, at = [jobs[place] for place in places], 0
            for batch in draw(chosen, sampling):
                yield [
                    {
                        "question": job.question,
                        "sample": job.sample,
                        "prompt_ids": job.ids,
                        "completion_ids": list(generated.ids),
                        "truncated": generated.truncated,
                    }
                    for job, generated in zip(chosen[at : at + len(batch)], batch, strict=True)
                ]
                at += len(batch)

        return batches

    keys = [(job.question, job.sample) for job in jobs]
    store = Store(folder, fields=("prompt_ids", "completion_ids", "truncated"))
    return _fill(store, settings, keys, batch_size, work, "sampling")


def score_rollouts(
    rollouts: Sequence[Record],
    scorer: Callable[[], Scorer],
    folder: Path,
    settings: dict[str, Any],
    batch_size: int,
    label: str = "scoring",
) -> Done:
    """
    Score every completion token of rollouts.

    Rollouts of like length share a batch, and the batches are the same after a kill: so are the scores, to the bit, as
    long as the batch size is.
    """
    order = sorted(rollouts, key=lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]))

    def work() -> Callable[[Sequence[int]], Iterator[list[Record]]]:
        score = scorer()

        def batches(places: Sequence[int]) -> Iterator[list[Record]]:
            chosen = [Rollout(order[place]["prompt_ids"], order[place]["completion_ids"]) for place in places]
            at = 0
            for batch in score(chosen):
                records = []
                for place, rollout, scores in zip(places[at:], chosen[at : at + len(batch)], batch, strict=False):
                    row = order[place]
                    check_scores(rollout, scores, f"rollout {row['sample']} of row {row['question']}")
                    key = {name: row[name] for name in ("question", "sample", "completion_ids")}
                    records.append({**key, "logprobs": scores})
                at += len(batch)
                yield records

        return batches

    keys = [(row["question"], row["sample"]) for row in order]
    store = Store(folder, fields=("completion_ids", "logprobs"))
    return _fill(store, settings, keys, batch_size, work, label)


def write_rollouts(
    path: Path, rollouts: Sequence[Record], teacher: Sequence[Record], reference: Sequence[Record], identity: Identity
) -> Dataset:
    """Write the rows that [`LightningOPDTrainer`] trains on."""
    scores = {(row["question"], row["sample"]): row["logprobs"] for row in teacher}
    own = {(row["question"], row["sample"]): row["logprobs"] for row in reference}
    ids, numbers = List(Value("int32")), List(Value("float32"))
    features = {"prompt_ids": ids, "completion_ids": ids, "teacher_logprobs": numbers}
    features |= {"reference_logprobs": numbers} if own else {}
    features |= {"truncated": Value("bool"), "row": Value("int32"), "sample": Value("int32")}
    # The number of rows tells a file that was cut from a whole one.
    text = json.dumps({**identity, "rows": len(rollouts)}, sort_keys=True, ensure_ascii=False)
    rows = []
    for row in rollouts:
        key = (row["question"], row["sample"])
        made = {name: row[name] for name in ("prompt_ids", "completion_ids", "truncated", "sample")}
        made |= {"teacher_logprobs": scores[key], "row": row["question"], "scored_with": text}
        rows.append({**made, "reference_logprobs": own[key]} if own else made)
    dataset = Dataset.from_list(rows, features=Features({**features, "scored_with": Value("string")}))
    write_rows(dataset, path)
    return dataset


def _fill(
    store: Store,
    settings: dict[str, Any],
    keys: Sequence[tuple[int, int]],
    batch_size: int,
    work: Callable[[], Callable[[Sequence[int]], Iterator[list[Record]]]],
    label: str,
) -> Done:
    """Bring a store up to all keys. Batches are cut from the whole list, so that they do not depend on what is there."""
    store.check(settings)
    done = _keys(store.read())
    store.write_settings(settings)
    tokens, start, run = 0, time.perf_counter(), None
    with tqdm(total=len(keys), initial=len(done & set(keys)), desc=label, unit="rollout") as bar:
        for first in range(0, len(keys), batch_size):
            places = range(first, min(first + batch_size, len(keys)))
            if all(keys[place] in done for place in places):
                continue
            if run is None:
                # The models are loaded outside of the time that the speed is taken from.
                run = work()
                start = time.perf_counter()
            for batch in run(places):
                new = [record for record in batch if (record["question"], record["sample"]) not in done]
                store.append(new)
                tokens += sum(len(record["completion_ids"]) for record in batch)
                bar.update(len(new))
    seconds = time.perf_counter() - start
    wanted = set(keys)
    return Done([row for row in store.read() if (row["question"], row["sample"]) in wanted], tokens, seconds)


def _keys(records: Iterable[Record]) -> set[tuple[int, int]]:
    return {(record["question"], record["sample"]) for record in records}
