"""Self-distillation: losses of a policy beside itself with a demonstration in its context."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from .schedules import linear_ramp


DIRECTIONS = ("reverse", "forward")
# Entries that are worked on at once: 256 MB in float32.
_ELEMENTS = 2**26


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, direction: str = "reverse", clip: float | None = None
) -> torch.Tensor:
    """
    KL divergence at each position over the whole vocabulary, in float32: `"reverse"` is `KL(P_S || P_T)`, `"forward"`
    `KL(P_T || P_S)`. With `clip` what each vocabulary entry adds is at most that (OPSD, arXiv 2601.18734, and its code).

    The teacher has no gradient; the student's is computed again in the backward pass, some positions at a time.

    Shapes: `student_logits` (N, V), `teacher_logits` (N, V), returns (N,).
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"`kl_direction` must be one of {', '.join(map(repr, DIRECTIONS))}, got {direction!r}.")

    def part(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_p, log_q = _log_softmax(student), _log_softmax(teacher)
        terms = log_p.exp() * (log_p - log_q) if direction == "reverse" else log_q.exp() * (log_q - log_p)
        return (terms if clip is None else terms.clamp(max=clip)).sum(-1)

    return _in_parts(part, student_logits, teacher_logits.detach())


def token_scores(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of tokens, and entropies.

    Shapes: `logits` (N, V), `token_ids` (N,), returns (N,) twice.
    """

    def part(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        log_p = _log_softmax(logits)
        return torch.stack([log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)])

    log_probs, entropies = _in_parts(part, logits, token_ids)
    return log_probs, entropies


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _in_parts(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    size = max(1, _ELEMENTS // first.size(-1))
    pieces = [
        checkpoint(
            function, first[at : at + size], second[at : at + size], use_reentrant=False, preserve_rng_state=False
        )
        for at in range(0, max(len(first), 1), size)
    ]
    return torch.cat(pieces, dim=-1)


def reweighted(advantages: torch.Tensor, log_ratio: torch.Tensor, weight: float, clip: float) -> torch.Tensor:
    """
    RLSD's advantages of tokens (arXiv 2604.03128), without gradient:
    `A ((1 - weight) + weight clamp(exp(sign(A) log_ratio), 1 - clip, 1 + clip))`, `log_ratio` being
    `log P_T(y_t) - log P_S(y_t)`. A right rollout's tokens count more where the teacher finds them likelier than the student does,
    a wrong one's where it finds them less likely; the sign is the reward's.

    Shapes: `advantages` (B, 1) or (B, T), `log_ratio` (B, T), returns (B, T).
    """
    evidence = torch.exp(advantages.sign() * log_ratio.detach()).clamp(1 - clip, 1 + clip)
    return advantages * ((1 - weight) + weight * evidence)


def ramped(step: int, value: float, warmup: int, decay: int, steps: int) -> float:
    """SDPG's weight of its divergence: linear from 0 over `warmup` updates, and to 0 over the last `decay` of `steps`."""
    rising = min(1.0, step / warmup) if warmup else 1.0
    falling = min(1.0, max(0, steps - step) / decay) if decay and steps else 1.0
    return value * rising * falling


def fading(step: int, value: float, steps: int) -> float:
    """RLSD's weight: linear from `value` to 0 over `steps` updates; constant with 0."""
    return linear_ramp(step, value, 0.0, steps) if steps else value
