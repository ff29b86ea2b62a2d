"""
A small search task: questions about people whose answers stand in documents, and a tool that finds those.

The engine is SQLite's full-text search (FTS5, ranked by BM25) in memory, over documents that are made here; nothing can write to it.
"""

import functools
import random
import re
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, DatasetDict

from .routes import LINE_NAMES, STOP_NAMES


# The people and where they live are the same in every process, so that a tool needs no argument to know them.
_WORLD = 7


class SearchEngine:
    """
    Full-text search over documents, read-only.

    Args:
        documents (`Sequence[tuple[str, str]]`):
            Their titles and texts. A word in a title counts ten times as much.
        results (`int`, *optional*, defaults to `1`):
            Most documents of an answer.
    """

    def __init__(self, documents: Sequence[tuple[str, str]], results: int = 1):
        self._results = results
        # Reward functions and tools may be called from another thread.
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute("CREATE VIRTUAL TABLE documents USING fts5(title, text)")
        self._database.executemany("INSERT INTO documents VALUES (?, ?)", documents)
        self._database.execute("PRAGMA query_only = ON")

    def search(self, query: str) -> str:
        """
        Find documents.

        Args:
            query: Words to look for.

        Returns:
            The best documents.
        """
        # Each word as a phrase: nothing of the query is read as FTS5's own syntax.
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", str(query)))
        if not words:
            return "nothing found"
        asked = (
            "SELECT title, text FROM documents WHERE documents MATCH ? "
            "ORDER BY bm25(documents, 10.0, 1.0), rowid LIMIT ?"
        )
        found = [f"{title} {text}" for title, text in self._database.execute(asked, (words, self._results))]
        return "\n".join(found) or "nothing found"


@functools.cache
def _people() -> dict[str, tuple[str, str]]:
    """Town and friend of each person."""
    generator = random.Random(_WORLD)
    names = [f"{first} {last}" for first in LINE_NAMES for last in generator.sample(STOP_NAMES, 10)]
    generator.shuffle(names)
    towns = [f"{generator.choice(STOP_NAMES)} {kind}" for kind in ("Hill", "Bay", "Ford") for _ in range(14)]
    return {name: (generator.choice(towns), names[place - 1]) for place, name in enumerate(names)}


def documents() -> list[tuple[str, str]]:
    """The documents of the task, one of each person: name, and what is said of them."""
    return [(name, f"lives in {town}. Friend: {friend}.") for name, (town, friend) in _people().items()]


@functools.cache
def _engine() -> SearchEngine:
    return SearchEngine(documents())


def search(query: str) -> str:
    """
    Find documents.

    Args:
        query: Words to look for.

    Returns:
        The best document.
    """
    return _engine().search(query)


def search_dataset(size: int = 80, test_size: int = 20, hops: int = 1, seed: int = 0) -> DatasetDict:
    """
    Questions about people, conversational.

    Args:
        size, test_size (`int`, *optional*, defaults to `80` and `20`):
            Rows of the two splits, of different people.
        hops (`int`, *optional*, defaults to `1`):
            1 asks where somebody lives, 2 where their friend does.
        seed (`int`, *optional*, defaults to `0`):
            Which people are in which split.

    Returns:
        [`~datasets.DatasetDict`]: columns `prompt` and `solution`; `completion`, a demonstration with its calls and their
        results; `plan`, what a human would do, in words, and `expert_steps`, its steps.
    """
    if hops not in (1, 2):
        raise ValueError(f"`hops` must be 1 or 2, got {hops}.")
    names = list(_people())
    if not 0 < size <= size + test_size <= len(names):
        raise ValueError(f"there are {len(names)} people, and `size` and `test_size` ask for {size} and {test_size}.")
    random.Random(seed).shuffle(names)
    splits = {"train": names[:size], "test": names[size : size + test_size]}
    return DatasetDict(
        {split: Dataset.from_list([_row(name, hops) for name in part]) for split, part in splits.items()}
    )


def _row(name: str, hops: int) -> dict[str, Any]:
    friend = _people()[name][1]
    town = _people()[name if hops == 1 else friend][0]
    steps = [f"Search for {name}. "]
    steps += ["Read who the friend is. ", f"Search for {friend}. "] if hops == 2 else []
    steps += ["Read where they live. ", f"Answer {town}."]
    whose = name if hops == 1 else f"the friend of {name}"
    return {
        "prompt": [{"role": "user", "content": f"Where does {whose} live?"}],
        "completion": [*_searches([name] if hops == 1 else [name, friend]), {"role": "assistant", "content": town}],
        "solution": town,
        "plan": "".join(steps),
        "expert_steps": steps,
    }


def _searches(queries: Iterable[str]) -> list[dict[str, Any]]:
    """A call of the tool and its result for each query."""
    turns: list[dict[str, Any]] = []
    for query in queries:
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        turns.append({"role": "tool", "name": "search", "content": search(query)})
    return turns


def search_reward(completions: list[list[dict[str, Any]]], solution: list[str], **kwargs: Any) -> list[float]:
    """1 where the last turn is the answer, without regard to case and a full stop; else 0."""
    return [float(_plain(turns[-1]) == gold.casefold()) for turns, gold in zip(completions, solution, strict=True)]


def _plain(turn: dict[str, Any]) -> str | None:
    said = turn["role"] == "assistant" and not turn.get("tool_calls")
    return str(turn.get("content") or "").strip().removesuffix(".").casefold() if said else None
