"""Addition of two numbers, as a generated dataset: `12+34=` is answered by `46`."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args


if TYPE_CHECKING:
    from datasets import Dataset


# From two numbers, and a generator to draw from, to what is said of their sum.
Answer = Callable[[int, int, random.Random], str]

# What the wrong answers are off by: the neighbours, and a forgotten or doubled carry.
ERRORS = (1, 2, 9, 10, 11)


def addition_pairs(max_number: int, seed: int) -> list[tuple[int, int]]:
    """All pairs of numbers from 0 to `max_number`, in a random order."""
    pairs = [(a, b) for a in range(max_number + 1) for b in range(max_number + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def wrong_sum(total: int, generator: random.Random) -> int:
    """A wrong answer close to the right one and not negative."""
    error = generator.choice(ERRORS)
    return total - error if generator.random() < 0.5 and total >= error else total + error


_WRONG: dict[str, Answer] = {
    "near": lambda a, b, generator: str(wrong_sum(a + b, generator)),
    "ten": lambda a, b, _: str(a + b + 10),
    "subtraction": lambda a, b, _: str(abs(a - b)),
    "leading-zero": lambda a, b, _: f"0{a + b}",
}

WrongKind = Literal["near", "ten", "subtraction", "leading-zero"]
WRONG_KINDS = get_args(WrongKind)
"""What a wrong answer can be: off by one of [`ERRORS`], ten too many, the numbers' difference, the sum with a zero in front."""


def wrong_answer(kind: str, a: int, b: int, generator: random.Random) -> str:
    """A wrong answer to `a + b`."""
    return _WRONG[kind](a, b, generator)


def addition_dataset(
    pairs: list[tuple[int, int]], wrong_share: float = 0.0, seed: int = 0, wrong_kind: str = "near"
) -> "Dataset":
    """
    Prompt-completion rows for pairs of numbers.

    Args:
        pairs (`list[tuple[int, int]]`):
            What is added.
        wrong_share (`float`, *optional*, defaults to `0.0`):
            Share of the rows, drawn at random, whose completion is wrong. The solution column always is right.
        seed (`int`, *optional*, defaults to `0`):
            Seed of which rows are wrong, and by how much.
        wrong_kind (`str`, *optional*, defaults to `"near"`):
            One of [`WRONG_KINDS`].

    Returns:
        [`~datasets.Dataset`]: columns `prompt`, `completion` and `solution`, all strings; one row for each pair.

    Raises:
        ValueError: `wrong_share` outside [0, 1], or no such `wrong_kind`.
    """
    if wrong_kind not in _WRONG:
        raise ValueError(f"`wrong_kind` must be one of {', '.join(WRONG_KINDS)}, got {wrong_kind!r}.")
    return _dataset(pairs, wrong_share, seed, lambda a, b, _: str(a + b), _WRONG[wrong_kind])


def worked_sum(a: int, b: int, slips: tuple[int, int] = (0, 0)) -> list[str]:
    """A sum worked in three steps: the units, the tens with what is carried, and the answer that the two make."""
    units = abs(a % 10 + b % 10 + slips[0])
    tens = abs(a // 10 + b // 10 + units // 10 + slips[1])
    return [f"{units},", f"{tens},", str(10 * tens + units % 10)]


def worked_dataset(pairs: list[tuple[int, int]], wrong_share: float = 0.0, seed: int = 0) -> "Dataset":
    """[`addition_dataset`] with worked answers. A wrong one has a slip of 1 in its units or in its tens."""
    slips = ((1, 0), (-1, 0), (0, 1), (0, -1))
    return _dataset(
        pairs,
        wrong_share,
        seed,
        lambda a, b, _: "".join(worked_sum(a, b)),
        lambda a, b, draw: "".join(worked_sum(a, b, draw.choice(slips))),
    )


def _dataset(pairs: list[tuple[int, int]], wrong_share: float, seed: int, right: Answer, wrong: Answer) -> "Dataset":
    """Rows whose `solution` is the right answer, and whose `completion` is, but for a share of wrong ones."""
    # Here, so that a comparison's file is read without it.
    from datasets import Dataset

    if not 0.0 <= wrong_share <= 1.0:
        raise ValueError(f"`wrong_share` must lie in [0, 1], got {wrong_share}.")
    generator = random.Random(seed)
    chosen = set(generator.sample(range(len(pairs)), round(wrong_share * len(pairs))))
    rows = []
    for index, (a, b) in enumerate(pairs):
        said = (wrong if index in chosen else right)(a, b, generator)
        rows.append({"prompt": f"{a}+{b}=", "completion": said, "solution": right(a, b, generator)})
    return Dataset.from_list(rows)
