"""
Passes without padding: the rows of a micro-batch as one sequence, a prompt that several rollouts share once.

TRL pads the rollouts of a generation batch to its longest prompt and its longest completion, and computes a group's prompt
again for each of its rollouts. Here the tokens of all rows lie one behind another, and each row attends to its own and to
its prompt only: the same log-probabilities, from a third of the positions or less.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .._upstream import compact_head


class Segment(NamedTuple):
    """Positions `start` to `end` of the sequence: they attend to themselves, and to those from `prefix` to `prefix_end`."""

    start: int
    end: int
    prefix: int = 0
    prefix_end: int = 0


class Segments:
    """Which positions of a packed sequence attend to which; the model's layers hand it on to the attention."""

    def __init__(self, segments: Sequence[Segment]):
        self._segments = segments
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def attend(
        self,
        attention: Callable[..., tuple[torch.Tensor, None]],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        The model's own attention, segment by segment.

        Shapes: query (1, heads, N, D), key and value (1, key heads, N, D); returns (1, N, heads, D).
        """
        pieces = []
        for start, end, prefix, prefix_end in self._segments:
            keys, values = key[:, :, start:end], value[:, :, start:end]
            if prefix_end > prefix:
                keys = torch.cat([key[:, :, prefix:prefix_end], keys], dim=2)
                values = torch.cat([value[:, :, prefix:prefix_end], values], dim=2)
            mask = self._mask(end - start, keys.size(2), kwargs.get("sliding_window"), query.device)
            pieces.append(attention(module, query[:, :, start:end], keys, values, mask, **kwargs)[0])
        return torch.cat(pieces, dim=1), None

    def _mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which keys the last `queries` of them see, (1, 1, queries, keys); `None` where causality says it all."""
        window = None if window is None or window >= keys else window
        if window is None and queries in (1, keys):
            return None
        if (queries, keys, window) not in self._masks:
            age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            seen = age >= 0 if window is None else (age >= 0) & (age < window)
            self._masks[queries, keys, window] = seen[None, None]
        return self._masks[queries, keys, window]


class Layout(NamedTuple):
    """A packed sequence: ids, positions and next-token labels, (1, N), and which positions attend to which."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    segments: Segments

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's forward takes."""
        return {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "shift_labels": self.labels,
            "packed_segments": self.segments,
            # A mask that is made already, so that transformers makes none of (N, N); the segments know better.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.ids.device),
            "use_cache": False,
        }


class _Builder:
    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.segments: list[Segment] = []
        self.length = 0

    def add(self, ids: torch.Tensor, labels: torch.Tensor, first: int = 0, prefix: tuple[int, int] = (0, 0)) -> None:
        """A segment whose first token is the `first`-th of its row."""
        start, self.length = self.length, self.length + len(ids)
        self.ids.append(ids)
        self.labels.append(labels)
        self.positions.append(torch.arange(first, first + len(ids), device=ids.device))
        self.segments.append(Segment(start, self.length, *prefix))

    def layout(self, filler: torch.Tensor, device: torch.device) -> Layout:
        """What was added; where that is nothing, one token of `filler` without a label."""
        if not self.segments:
            # Every rank runs the same passes, and a step with gradients of zero is another one than without any.
            self.add(filler[0, -1:], _unlabelled(filler[0, -1:]))
        ids, positions, labels = (torch.cat(part)[None].to(device) for part in (self.ids, self.positions, self.labels))
        return Layout(ids, positions, labels, Segments(self.segments))


def _unlabelled(ids: torch.Tensor) -> torch.Tensor:
    return torch.full_like(ids, -100)


def lay_out_rollouts(
    ids: torch.Tensor, mask: torch.Tensor, length: int, rows: Sequence[int], share_prompts: bool
) -> Layout:
    """
    The rows of prompts and completions, each completion's tokens labelled.

    A shared prompt lies there once without its last token, which every one of its rollouts has at its head: so each
    position has one label at most.

    Args:
        ids, mask (`torch.Tensor` of shape `(B, P + T)`):
            Left-padded prompts before right-padded completions, and which tokens are there.
        length (`int`):
            T.
        rows (`Sequence[int]`):
            The rows to take. One that has no completion is left out.
        share_prompts (`bool`):
            Whether rows with the same prompt share it.
    """
    device, ids, mask = ids.device, ids.cpu(), mask.cpu()  # cut up there: each cut on a GPU would wait for it
    built = _Builder()
    taken = []
    for row in rows:
        there = mask[row].bool()
        prompt, completion = ids[row, :-length][there[:-length]], ids[row, -length:][there[-length:]]
        if len(completion):
            taken.append((tuple(prompt.tolist()) if share_prompts else row, prompt, completion))
    sharing = Counter(key for key, _, _ in taken)
    heads: dict[Any, tuple[int, int]] = {}
    for key, prompt, completion in taken:
        head, body = prompt[:-1], torch.cat([prompt[-1:], completion[:-1]])
        if sharing[key] == 1 or not len(head):
            built.add(torch.cat([head, body]), torch.cat([_unlabelled(head), completion]))
            continue
        if key not in heads:
            heads[key] = (built.length, built.length + len(head))
            built.add(head, _unlabelled(head))
        built.add(body, completion, len(head), heads[key])
    return built.layout(ids, device)


def positions_needed(ids: torch.Tensor, mask: torch.Tensor, length: int, rows: Sequence[int]) -> int:
    """How many positions `lay_out_rollouts` gives these rows where they share prompts."""
    ids, there = ids[list(rows)], mask[list(rows)].bool()
    completed = there[:, -length:].any(dim=1)
    prompts = torch.where(there, ids, -1)[completed, :-length].unique(dim=0)
    return max(1, int((prompts >= 0).sum() - len(prompts) + there[:, -length:].sum()))


def lay_out_rows(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Layout:
    """
    Right-padded rows with labels for some of their own tokens.

    Shapes: ids, mask, labels (B, T).
    """
    device, ids, mask, labels = ids.device, ids.cpu(), mask.cpu(), labels.cpu()
    built = _Builder()
    for row in range(len(ids)):
        length = int(mask[row].sum())
        if length > 1:
            built.add(ids[row, : length - 1], labels[row, 1:length])
    return built.layout(ids, device)


def spread(values: torch.Tensor, layout: Layout, where: torch.Tensor) -> torch.Tensor:
    """
    Values at a layout's labels, in the places of the tokens that they are labels of; zero elsewhere.

    Shapes: values (1, N), where (B, T) with as many places as labels, in their order; returns (B, T).
    """
    return values.new_zeros(where.shape).masked_scatter(where, values[layout.labels != -100])


def run(model: nn.Module, layout: Layout, **head: Any) -> Any:
    """A model's fused forward over a packed sequence; what its head gives is (1, N)."""
    with compact_head():
        return model(**layout.inputs, **head)


# When passes are packed

_BY_LENGTH = ("dynamic", "longrope")
_ATTENTION = {"full_attention", "sliding_attention"}


def reason_for_padding(model: Any) -> str | None:
    """Why a model's passes cannot be packed exactly; `None` where they can."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    layers = set(getattr(config, "layer_types", None) or ())
    peft = getattr(model, "active_peft_config", None)
    dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
    reasons = {
        "it is a vision-language model, whose pictures have positions and masks of their own": hasattr(
            model.config, "vision_config"
        ),
        "its attention is its own, not one of transformers' functions": not model._supports_attention_backend,
        f"its attention is {config._attn_implementation!r}; it is tested with 'sdpa'": config._attn_implementation
        != "sdpa",
        "its positions are not rotary by `rope_parameters`, and others move with the padding": not ropes
        or getattr(config, "alibi", False),
        "its rotary frequencies depend on the length": any(part["rope_type"] in _BY_LENGTH for part in ropes),
        "it has layers of other kinds than full and sliding attention": not layers <= _ATTENTION,
        "it draws dropout for each position": dropout or getattr(config, "attention_dropout", 0.0) > 0.0,
        "its forward computes a load-balancing loss, which shared prompts would change": getattr(
            config, "output_router_logits", False
        ),
        "its adapter learns a prompt": getattr(peft, "is_prompt_learning", False),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def disagreement(
    packed: Callable[[], torch.Tensor],
    padded: Callable[[], torch.Tensor],
    embeddings: nn.Module,
    *,
    with_gradient: bool = True,
) -> float:
    """
    How far two passes over the same rollouts are apart: the larger of the relative errors of their log-probabilities and
    of a gradient, that of their sum with respect to a factor on each of the embedding's features.

    That gradient has gone through every layer, and needs none of a weight, which belong to the student's update.
    """
    seen = []
    for score in (padded, packed):
        factor: torch.Tensor | None = None

        def scale(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            nonlocal factor
            factor = torch.ones_like(output[0, 0], dtype=torch.float32).requires_grad_()
            return (output * factor).to(output.dtype)

        hook = embeddings.register_forward_hook(scale)
        try:
            log_probs = score()
        finally:
            hook.remove()
        assert factor is not None
        gradient = torch.autograd.grad(log_probs.float().sum(), factor)[0] if with_gradient else factor.detach()
        seen.append((log_probs.detach().float(), gradient))
    errors = [(fast - plain).norm() / plain.norm().clamp(min=1e-12) for plain, fast in zip(*seen, strict=True)]
    return float(torch.stack(errors).max())


# Which micro-batch a row goes to


def deal(
    keys: Sequence[Any], costs: Sequence[int], heads: Sequence[int], micro_batches: int, size: int
) -> list[list[int]]:
    """
    Deal rows to micro-batches of `size`, from the one with the most tokens to the one with the fewest: rows with the same
    key together where they fit, and tokens spread evenly.

    Args:
        keys (`Sequence`):
            What says which rows share a prompt.
        costs (`Sequence[int]`):
            Tokens that each row adds; 0 for a row that is not run.
        heads (`Sequence[int]`):
            Tokens of each row's prompt, which the rows of a key pay once.
        micro_batches (`int`):
            How many; they hold all rows.
        size (`int`):
            Rows of each.

    Returns:
        `list[list[int]]`: the rows of each micro-batch.
    """
    pieces: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        # What is not run fills up, wherever there is room.
        pieces.setdefault((key, costs[row] > 0), []).append(row)
    weights = {key: sum(costs[row] for row in rows) + heads[rows[0]] * key[1] for key, rows in pieces.items()}
    dealt: list[list[int]] = [[] for _ in range(micro_batches)]
    loads = [0.0] * micro_batches
    for key in sorted(pieces, key=lambda key: -weights[key]):
        rows = sorted(pieces[key], key=lambda row: -costs[row])
        while rows:
            free = [size - len(batch) for batch in dealt]
            fitting = [index for index in range(micro_batches) if free[index] >= min(len(rows), size)]
            index = (
                min(fitting, key=lambda i: loads[i]) if fitting else max(range(micro_batches), key=lambda i: free[i])
            )
            taken, rows = rows[: free[index]], rows[free[index] :]
            dealt[index] += taken
            loads[index] += sum(costs[row] for row in taken) + heads[taken[0]] * key[1]
    return [dealt[index] for index in sorted(range(micro_batches), key=lambda i: -loads[i])]
