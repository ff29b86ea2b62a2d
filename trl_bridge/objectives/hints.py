"""How much of a solution is shown as a hint: schedules of UFT (arXiv 2505.16984)."""

from .schedules import cosine_decay


def hint_probability(step: int, high: float, low: float, steps: int) -> float:
    """
    Probability that a piece of the solution is shown, `q(t) = low + (high - low) (1 + cos(pi (t + 1) / T)) / 2`.

    The first update has `t = 0` (the released code counts from 1 and writes `t`, which is the same), the last hinted
    one `t = T - 1` with `q = low`; then `q = 0`.

    Args:
        step (`int`):
            Number of the update, `t`, from 0.
        high (`float`):
            Limit of the probability at the start.
        low (`float`):
            Probability in the last hinted update.
        steps (`int`):
            Number of hinted updates, `T`.

    Returns:
        `float`: the probability, in [0, 1].
    """
    return 0.0 if step >= steps else cosine_decay(step + 1, high, low, steps)


def hint_stage(step: int, pieces: int, steps: int) -> int:
    """
    Number of pieces shown by a fixed staircase from all pieces down to none, `n - floor((t + 1) / floor(T / (n + 1)))`.

    Args:
        step (`int`):
            Number of the update, `t`, from 0.
        pieces (`int`):
            Number of pieces of the solution, `n`.
        steps (`int`):
            Number of updates of the stairs, `T`; below `n + 1` each stair is one update.

    Returns:
        `int`: from 0 to `pieces`.
    """
    if step >= steps:
        return 0
    return max(0, pieces - (step + 1) // max(1, steps // (pieces + 1)))
