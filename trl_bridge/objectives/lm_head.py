"""Log-probabilities from hidden states, some tokens at a time, so that the logits of a batch are never held."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint


# Logits that exist at once: 256 MB in float32.
_ELEMENTS = 2**26


class Head(NamedTuple):
    """
    A language model's head: from hidden states to logits.

    Shapes: `weight` (V, H), `bias` (V,).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Logits of hidden states, in float32 (float64 for float64), whatever autocast says: a log-probability that is
        rounded to 16 bits is no use as an advantage.

        Shapes: `hidden` (N, H), returns (N, V).
        """
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias) * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits / self.temperature


class TeacherScores(NamedTuple):
    """
    What a teacher says about the tokens of a rollout, without graph.

    Shapes: `log_probs` (N,), `top_ids` (N, K), `top_log_probs` (N, K).
    """

    log_probs: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor


class StudentScores(NamedTuple):
    """
    What the student says about the same tokens.

    Shapes: `log_probs` (N,), `top_log_probs` (N, K), `entropy` (N,).
    """

    log_probs: torch.Tensor
    top_log_probs: torch.Tensor
    entropy: torch.Tensor


@torch.no_grad()
def teacher_scores(
    hidden: torch.Tensor, token_ids: torch.Tensor, head: Head, top_k: int = 0, chunk: int | None = None
) -> TeacherScores:
    """
    The teacher's log-probabilities of tokens, and its likeliest tokens.

    Shapes: `hidden` (N, H), `token_ids` (N,).
    """
    top_k = min(top_k, head.weight.size(0))

    def score(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = head.logits(hidden)
        log_z = logits.logsumexp(-1, keepdim=True)
        top, top_ids = logits.topk(top_k, dim=-1)
        return (logits.gather(-1, ids[:, None]) - log_z).squeeze(-1), top_ids, top - log_z

    return TeacherScores(*_in_chunks(score, (hidden, token_ids), head, chunk))


def student_scores(
    hidden: torch.Tensor, token_ids: torch.Tensor, top_ids: torch.Tensor, head: Head, chunk: int | None = None
) -> StudentScores:
    """
    The student's log-probabilities of tokens, and of the teacher's likeliest ones.

    The logits of a chunk are thrown away after it and computed again in the backward pass.

    Shapes: `hidden` (N, H), `token_ids` (N,), `top_ids` (N, K).
    """

    def score(hidden: torch.Tensor, ids: torch.Tensor, top_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = head.logits(hidden)
        log_z = logits.logsumexp(-1, keepdim=True)
        with torch.no_grad():
            entropy = log_z.squeeze(-1) - ((logits - log_z).exp() * logits).sum(-1)
        return (logits.gather(-1, ids[:, None]) - log_z).squeeze(-1), logits.gather(-1, top_ids) - log_z, entropy

    def kept_small(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return checkpoint(score, *parts, use_reentrant=False, preserve_rng_state=False)

    function = kept_small if torch.is_grad_enabled() else score
    return StudentScores(*_in_chunks(function, (hidden, token_ids, top_ids), head, chunk))


def _in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]],
    parts: tuple[torch.Tensor, ...],
    head: Head,
    chunk: int | None,
) -> list[torch.Tensor]:
    tokens = parts[0].size(0)
    step = chunk or max(1, _ELEMENTS // head.weight.size(0))
    # Without a token there is still one call: the head and the hidden states stay in the graph, as DDP needs.
    pieces = [function(*(part[i : i + step] for part in parts)) for i in range(0, max(tokens, 1), step)]
    return [torch.cat(outputs) for outputs in zip(*pieces, strict=True)]
