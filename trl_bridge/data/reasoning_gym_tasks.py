"""
reasoning-gym tasks with worked solutions, generated without a download.

A worked solution is written from what the generator itself knows about the row (its metadata), so it is always right and
ends with "The answer is ...".
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict


# Row i of a reasoning-gym dataset is drawn from seed + i, so seeds that are neighbours share nearly all rows.
_SEED_STRIDE = 1_000_000
# Their rows follow the order of sets of texts, which is another one in each process. With no random hashes it is one.
_OF_SETS = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")


def _chain_sum(row: dict[str, Any]) -> list[str]:
    first, *rest = re.split(r" ([+-]) ", row["metadata"]["expression"])
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return lines


def _gcd(row: dict[str, Any]) -> list[str]:
    first, *rest = row["metadata"]["numbers"]
    current, lines = first, []
    for number in rest:
        a, b = max(current, number), min(current, number)
        while b:
            lines.append(f"{a} mod {b} = {a % b}")
            a, b = b, a % b
        current = math.gcd(current, number)
    return lines


def _gsm_symbolic(row: dict[str, Any]) -> list[str]:
    return row["metadata"]["answer_cot"].split("\n####")[0].splitlines()


def _knights_knaves(row: dict[str, Any]) -> list[str]:
    names, terms = row["metadata"]["names"], row["metadata"]["knight_knave_terms"]
    lines: list[str] = []
    for roles in itertools.product((True, False), repeat=len(names)):
        said = [
            f"{name} is {terms['a_knight' if role else 'a_knave']}" for name, role in zip(names, roles, strict=True)
        ]
        case = f"Suppose {', '.join(said)}."
        wrong = [i for i, statement in enumerate(row["metadata"]["statements"]) if _true(statement, roles) != roles[i]]
        if not wrong:
            return [*lines, f"{case} Then every statement fits."]
        kind = "lie" if roles[wrong[0]] else "tell the truth"
        lines.append(f"{case} Then {names[wrong[0]]} would {kind}, which cannot be.")
    raise ValueError("a puzzle without a solution")


def _true(statement: Any, roles: tuple[bool, ...]) -> bool:
    operator, *parts = statement
    if operator in ("telling-truth", "lying"):
        return roles[parts[0]] == (operator == "telling-truth")
    values = [_true(part, roles) for part in parts]
    if operator == "not":
        return not values[0]
    if operator == "->":
        return not values[0] or values[1]
    return {"and": all(values), "or": any(values), "<=>": values[0] == values[-1]}[operator]


WORKED_SOLUTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "chain_sum": _chain_sum,
    "gcd": _gcd,
    "gsm_symbolic": _gsm_symbolic,
    "knights_knaves": _knights_knaves,
}
"""Tasks that have demonstrations, with the function that gives the lines of the working."""


def worked_solution(row: dict[str, Any]) -> str:
    """Demonstration for a row of reasoning-gym."""
    working = WORKED_SOLUTIONS[row["metadata"]["source_dataset"]](row)
    return "\n".join([*working, f"The answer is {row['answer'].removesuffix('.')}."])


def reasoning_gym_dataset(
    task: str, size: int = 1000, test_size: int = 200, seed: int = 0, **parameters: Any
) -> DatasetDict:
    """
    Rows of a reasoning-gym task, conversational, with the generator's worked solution where there is one.

    Args:
        task (`str`):
            Name of the task in reasoning-gym, such as `"chain_sum"`.
        size (`int`, *optional*, defaults to `1000`):
            Number of training rows.
        test_size (`int`, *optional*, defaults to `200`):
            Number of test rows. No test question is a training question; fewer rows than asked for are given where the
            task has no more different ones.
        seed (`int`, *optional*, defaults to `0`):
            Seed; different seeds share no rows but by chance.
        **parameters:
            The task's own parameters, such as `max_terms=3`.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `test` with the columns `prompt` (messages), `completion` (messages; only
        for the tasks in [`WORKED_SOLUTIONS`]), `solution` (`str`) and `metadata` (JSON), as
        [`~trl_bridge.rewards.reasoning_gym_reward`] reads them.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such task, or a parameter that it does not have or accept.
    """
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reasoning-gym tasks need the package `reasoning-gym`: pip install 'trl-bridge[demo]'"
        ) from error

    def generate(count: int, offset: int) -> list[dict[str, Any]]:
        make = _without_random_hashes if task in _OF_SETS else _generated
        return make(task, seed * _SEED_STRIDE + offset, count, parameters)

    train = generate(size, 0)
    seen = {row["question"] for row in train}
    test: list[dict[str, Any]] = []
    # The smallest tasks have few different questions, so a bounded number of candidates is drawn.
    for row in generate(4 * test_size, _SEED_STRIDE // 2) if test_size else []:
        if row["question"] not in seen and len(test) < test_size:
            seen.add(row["question"])
            test.append(row)
    splits = {"train": train, "test": test}
    return DatasetDict({name: Dataset.from_list([_example(row) for row in rows]) for name, rows in splits.items()})


def _generated(task: str, seed: int, size: int, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    import reasoning_gym

    try:
        with _own_randomness(seed):
            return list(reasoning_gym.create_dataset(task, seed=seed, size=size, **parameters))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym cannot make the task {task!r} with {parameters}: {error}") from error


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """The global random state, which some tasks draw from, and one sets: theirs inside, the caller's afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _without_random_hashes(task: str, seed: int, size: int, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task from a process in which texts have one hash."""
    code = f"import sys; from {__name__} import _print_rows; _print_rows()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([task, seed, size, parameters]),
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("ValueError: "))
    return json.loads(done.stdout)


def _print_rows() -> None:
    rows = _generated(*json.load(sys.stdin))
    json.dump(rows, sys.stdout, default=str)


def _example(row: dict[str, Any]) -> dict[str, Any]:
    example = {"prompt": [{"role": "user", "content": row["question"].strip()}]}
    if row["metadata"]["source_dataset"] in WORKED_SOLUTIONS:
        example["completion"] = [{"role": "assistant", "content": worked_solution(row)}]
    # Metadata differs from row to row and holds tuples and numpy values, which a column cannot.
    return {**example, "solution": row["answer"], "metadata": json.dumps(row["metadata"], default=str)}
