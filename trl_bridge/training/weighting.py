"""The state behind `sft_weighting`: what a weight needs beyond the tokens that it is put on."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.logging import get_logger

from ..objectives import weights as rules


logger = get_logger(__name__)

# Kinds that are normalised to mean one, and the raw weight of each.
_NORMALISED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "likelihood": rules.token_likelihood,
    "likelihood_sequence": rules.sequence_likelihood,
    "phi": rules.phi,
}
_JUDGE = ("judge", "judge_verdict")
_VERDICT = ("verdict", "judge_verdict")
# A mean weight below which demonstrations no longer count.
_NOTHING_LEFT = 0.01


@dataclasses.dataclass(eq=False)
class DemonstrationWeighting:
    """
    Weights of demonstrations, and the running mean, rollouts and verdicts that they are made from.

    A window (the micro-batches of one optimizer update) goes: `visits_due`, `record_verdicts` and `fold_verdicts`
    where verdicts are needed; `begin_window`; `raw` and `set_initial_mean` where `needs_initial_mean`; `token_weights`
    for each micro-batch and `observe_rollouts` at any time; `end_window` with every rank's `pending`. Nothing of the
    current window but its verdicts enters its own weights (the first window's mean excepted), so that neither its
    split into micro-batches, nor the number of ranks, nor a resume between windows changes them.
    """

    kind: str
    judge_window: int = 20
    judge_beta: float = 4.0
    judge_penalty: float = 1.0
    judge_per_token: bool = False
    verdict_calls: int = 1

    def __post_init__(self) -> None:
        kinds = ["none", *_NORMALISED, "judge", "verdict", "judge_verdict"]
        if self.kind not in kinds:
            raise ValueError(f"`sft_weighting` must be one of {', '.join(kinds)}, got {self.kind!r}.")
        for name in ("judge_window", "verdict_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.judge_penalty > 0:
            raise ValueError(f"`judge_penalty` must be above 0, got {self.judge_penalty}.")
        if not self.judge_beta >= 0:
            raise ValueError(f"`judge_beta` must not be negative, got {self.judge_beta}.")
        # What a resumed run must share.
        self._options = {"sft_weighting" if name == "kind" else name: value for name, value in vars(self).items()}
        # Past windows, the same on all ranks.
        self._total, self._count = 0.0, 0.0  # raw weights summed, and how many
        self._rollouts: deque[list[tuple[float, float]]] = deque(maxlen=self.judge_window)  # (s, r) of each window
        self._verdicts: dict[int, tuple[int, int]] = {}  # row -> (calls, positives)
        self._refused = 0  # windows in a row that left nothing of the demonstrations; no part of a checkpoint
        # The window under way.
        self._initial_mean: float | None = None
        self._fit: rules.JudgeFit | None = None
        self._eps, self._prior = rules.MIN_FLIP_RATE, 0.5
        self._local_raw: list[tuple[torch.Tensor, torch.Tensor]] = []  # sum and number of each micro-batch
        self._local_rollouts: list[tuple[float, float]] = []
        self._local_verdicts: dict[int, tuple[int, int]] = {}

    @property
    def needs_rollouts(self) -> bool:
        """Whether rollouts have to be observed."""
        return self.kind in _JUDGE

    @property
    def needs_verdicts(self) -> bool:
        """Whether the verifier has to be called on demonstrations."""
        return self.kind in _VERDICT

    @property
    def needs_initial_mean(self) -> bool:
        """Whether the weights have no past mean and the first window's own has to be set."""
        return self.kind in _NORMALISED and self._count == 0 and self._initial_mean is None

    # Verdicts: before `begin_window`

    def visits_due(self, rows: list[int]) -> list[int]:
        """Calls of the verifier that are due for each demonstration visited."""
        seen = set(self._verdicts)
        due = []
        for row in rows:
            due.append(self.verdict_calls + (row not in seen))
            seen.add(row)
        return due

    def record_verdicts(self, rows: Iterable[int], positives: Iterable[int]) -> None:
        """Keep verdicts of this rank until they are exchanged."""
        for row, positive in zip(rows, positives, strict=True):
            calls, right = self._local_verdicts.get(row, (0, 0))
            self._local_verdicts[row] = (calls + 1, right + int(positive))

    def pending_verdicts(self) -> list[tuple[int, int, int]]:
        """This rank's verdicts that are not exchanged yet: `(row, calls, positives)`, picklable."""
        return [(row, calls, right) for row, (calls, right) in self._local_verdicts.items()]

    def fold_verdicts(self, all_ranks: list[list[tuple[int, int, int]]]) -> None:
        """Add every rank's verdicts to the counts."""
        for row, calls, right in chain.from_iterable(all_ranks):
            old_calls, old_right = self._verdicts.get(row, (0, 0))
            self._verdicts[row] = (old_calls + calls, old_right + right)
        self._local_verdicts = {}

    def verdicts(self, rows: list[int]) -> tuple[list[int], torch.Tensor]:
        """After `begin_window`: calls on demonstrations, and the probability that each is right."""
        calls, right = self._counts(rows)
        return calls, rules.verdict_weight(calls, right, self._eps, self._prior)

    # The window

    def begin_window(self) -> None:
        """Fit the judge on past windows; read flip rate and prior from the verdicts, this window's included."""
        if self.needs_rollouts:
            # Sorted, so that the sums do not depend on how the rollouts were spread over ranks and micro-batches.
            pairs = sorted(chain.from_iterable(self._rollouts))
            self._fit = rules.fit_judge([s for s, _ in pairs], [r for _, r in pairs], self.judge_penalty)
        if self.needs_verdicts:
            calls, right = self._counts(sorted(self._verdicts))
            self._eps = rules.flip_rate(calls, right)
            self._prior = rules.verdict_prior(calls, right, self._eps)

    def raw(self, log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Weights of the normalised kinds before they are divided by their mean."""
        rule = _NORMALISED.get(self.kind)
        return None if rule is None else rule(log_probs, mask)

    def set_initial_mean(self, total: float, count: float) -> None:
        """Set the mean that the first window divides by: its own."""
        if not count > 0:
            raise ValueError(f"`count` must be above 0, got {count}: the first window has no demonstration.")
        self._initial_mean = total / count

    def token_weights(
        self, log_probs: torch.Tensor, mask: torch.Tensor, rows: list[int], sequence_log_probs: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Weights of one micro-batch."""
        if self.kind == "none":
            return None
        if not rows:
            return torch.ones_like(log_probs[:, :1]).detach()
        raw = self.raw(log_probs, mask)
        if raw is not None:
            weights = self._normalised(raw, mask)
        else:
            weights = torch.ones(len(rows), 1, dtype=torch.float64, device=log_probs.device)
        if self.needs_rollouts:
            if sequence_log_probs is None:
                sequence_log_probs = log_probs.detach().double().masked_fill(~mask, 0.0).sum(dim=1)
            judged = self.judged(sequence_log_probs, mask.sum(dim=1))
            weights = weights * rules.judge_weight(judged, self._fit, self.judge_beta)[:, None]
        if self.needs_verdicts:
            _, verdict = self.verdicts(rows)
            weights = weights * verdict.to(weights.device)[:, None]
        return weights.to(log_probs.dtype)

    def judged(self, log_likelihoods: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the judge reads of completions."""
        return log_likelihoods / lengths.clamp(min=1) if self.judge_per_token else log_likelihoods

    def observe_rollouts(self, pairs: list[tuple[float, float]]) -> None:
        """Keep rollouts of this rank until the window ends."""
        for s, r in pairs:
            if not (math.isfinite(s) and math.isfinite(r)):
                raise ValueError(
                    f"A rollout has log-likelihood {s} and reward {r}: the judge of `sft_weighting` cannot be fitted "
                    "on it. The policy or a reward function returns values that are not finite."
                )
        self._local_rollouts += pairs

    def pending(self) -> dict[str, Any]:
        """What this rank has gathered in the window, picklable: `rollouts` (pairs), `raw_total` and `raw_count`."""
        return {
            "rollouts": list(self._local_rollouts),
            "raw_total": math.fsum(float(total) for total, _ in self._local_raw),
            "raw_count": math.fsum(float(count) for _, count in self._local_raw),
        }

    def end_window(self, all_pending: list[dict[str, Any]]) -> None:
        """Close the window and add it to the past."""
        self._total = math.fsum([self._total, *(pending["raw_total"] for pending in all_pending)])
        self._count = math.fsum([self._count, *(pending["raw_count"] for pending in all_pending)])
        if self.needs_rollouts:
            self._rollouts.append([pair for pending in all_pending for pair in pending["rollouts"]])
        self._initial_mean = None
        self._local_raw, self._local_rollouts = [], []

    def note_mean(self, mean: float) -> None:
        """
        Warn where `judge_window` windows in a row have left next to nothing of the demonstrations: RL only, at the
        price of both.
        """
        if not (self.needs_rollouts or self.needs_verdicts):
            return
        self._refused = self._refused + 1 if mean < _NOTHING_LEFT else 0
        if self._refused == self.judge_window:
            logger.warning(
                f"`sft_weighting='{self.kind}'` has left nothing of the demonstrations for {self._refused} updates "
                f"(`sft/weight_mean` below {_NOTHING_LEFT}): this is RL alone. Either they are wrong, or the policy finds "
                "them unlikely and is paid for what it says already. Where they are known to be right, take "
                "`sft_weighting='verdict'` or `'none'`: the judge would not let the policy learn a style of its own."
            )

    def metrics(self) -> dict[str, float]:
        """`sft/judge_slope` once there is a judge, and `sft/verdict_flip_rate` where verdicts are used."""
        values = {}
        if self._fit is not None:
            values["sft/judge_slope"] = self._fit.b1
        if self.needs_verdicts:
            values["sft/verdict_flip_rate"] = self._eps
        return values

    def discard_window(self) -> None:
        """Forget what an unfinished window has gathered: an exception cut it off, or a checkpoint is loaded."""
        self._initial_mean = None
        self._local_raw, self._local_rollouts, self._local_verdicts = [], [], {}

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """
        State for a checkpoint, between two windows: plain values and tensors, as `torch.load(weights_only=True)` takes
        them.
        """
        if self._local_raw or self._local_rollouts or self._local_verdicts:
            raise RuntimeError("The weighting of demonstrations cannot be saved inside an accumulation window.")
        verdicts = [(row, calls, right) for row, (calls, right) in sorted(self._verdicts.items())]
        return {
            "options": self._options,
            "total": self._total,
            "count": self._count,
            "rollouts": [torch.tensor(pairs, dtype=torch.float64).view(-1, 2) for pairs in self._rollouts],
            "verdicts": torch.tensor(verdicts, dtype=torch.int64).view(-1, 3),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a saved weighting stood."""
        for name, mine in self._options.items():
            if state["options"][name] != mine:
                raise ValueError(
                    f"The checkpoint was made with `{name}={state['options'][name]!r}`, now it is {mine!r}. Resume "
                    "with the options that it was made with."
                )
        self.discard_window()
        self._total, self._count = state["total"], state["count"]
        self._rollouts.clear()
        self._rollouts.extend([(s, r) for s, r in pairs.tolist()] for pairs in state["rollouts"])
        self._verdicts = {row: (calls, right) for row, calls, right in state["verdicts"].tolist()}

    # Helpers

    def _normalised(self, raw: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counted = mask if raw.size(1) == mask.size(1) else mask.any(dim=1, keepdim=True)
        if self.needs_initial_mean:
            raise RuntimeError("`set_initial_mean` has to be called in the first window, before its weights are read.")
        self._local_raw.append((raw.masked_fill(~counted, 0.0).sum(), counted.sum()))
        mean = self._total / self._count if self._initial_mean is None else self._initial_mean
        # A mean of zero: every likelihood so far was below what float64 holds, and none stands out.
        return raw / mean if mean > 0 else torch.ones_like(raw)

    def _counts(self, rows: list[int]) -> tuple[list[int], list[int]]:
        counts = [self._verdicts.get(row, (0, 0)) for row in rows]
        return [calls for calls, _ in counts], [right for _, right in counts]


class RolloutObserver:
    """Tells the judge what the rollouts are worth, and how likely the policy finds them."""

    def __init__(self, weighting: DemonstrationWeighting, eos_token_ids: Sequence[int], success_threshold: float):
        self._weighting = weighting
        self._eos_token_ids = list(eos_token_ids)
        self._success_threshold = success_threshold

    def take(self, output: dict[str, Any], rewards: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Observe a generation batch that comes with its log-probabilities; otherwise its rewards are to travel with it.

        Shapes: rewards (rows,).
        """
        if not self._weighting.needs_rollouts:
            return {}
        if "old_per_token_logps" in output:
            self._observe({**output, "rollout_reward": rewards}, output["old_per_token_logps"])
            return {}
        return {"rollout_reward": rewards}

    def observe(self, inputs: dict[str, Any], log_probs: torch.Tensor) -> None:
        """Observe a micro-batch that the policy has just scored for the first time."""
        if "rollout_reward" in inputs:
            self._observe(inputs, log_probs)

    def _observe(self, inputs: dict[str, Any], log_probs: torch.Tensor) -> None:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        lengths = mask.sum(dim=1)
        last = ids.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        eos = torch.tensor(self._eos_token_ids, device=ids.device)
        # A rollout that was cut off has no likelihood as a whole; one that nobody could score has no reward.
        usable = (lengths > 0) & torch.isin(last, eos) & ~torch.isnan(inputs["rollout_reward"])
        own = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        sums = self._weighting.judged((log_probs.double() * own).sum(dim=1), own.sum(dim=1))[usable]
        right = (inputs["rollout_reward"][usable] >= self._success_threshold).double()
        self._weighting.observe_rollouts(list(zip(sums.tolist(), right.tolist(), strict=True)))
