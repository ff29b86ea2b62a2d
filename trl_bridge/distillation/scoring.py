"""A teacher's log-probability of every token of a completion: from a model in this process, or from a vLLM server."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._upstream import add_fused_lm_head, teacher_client
from ..generation.engines import HalvingBatches
from ..objectives.lm_head import TeacherScores
from .identity import check_identity
from .teacher import batch_of


class Rollout(NamedTuple):
    """A prompt and one completion of it, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]


def rollouts_in(batch: Mapping[str, torch.Tensor]) -> list[Rollout]:
    """A batch's rollouts without padding."""
    ids, there = ({part: batch[f"{part}_{what}"] for part in ("prompt", "completion")} for what in ("ids", "mask"))
    lists = {part: [row[m.bool()].tolist() for row, m in zip(ids[part], there[part], strict=True)] for part in ids}
    return [Rollout(*pair) for pair in zip(lists["prompt"], lists["completion"], strict=True)]


class Scorer(Protocol):
    """Log-probabilities at temperature 1 of all completion tokens, batch by batch, in the order of the rollouts."""

    name: str

    def __call__(self, rollouts: Sequence[Rollout]) -> Iterator[list[list[float]]]: ...


class LocalTeacher(HalvingBatches):
    """
    Scores with a model in this process, through TRL's fused head, in float32 whatever the model's precision: logits of
    the whole vocabulary are never kept. Out of memory, the batch is halved until it fits, and stays there.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, batch_size: int = 16):
        super().__init__(batch_size)
        self.model = model.eval()
        # Rounded to 16 bits, a log-probability is no use in an advantage.
        add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=True)

    def __call__(self, rollouts: Sequence[Rollout]) -> Iterator[list[list[float]]]:
        return self.in_batches(rollouts, self._scores)

    @torch.no_grad()
    def _scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        rows = [torch.tensor(each.prompt_ids + each.completion_ids) for each in rollouts]
        heads = [len(each.prompt_ids) for each in rollouts]
        pad = torch.nn.utils.rnn.pad_sequence
        # What stands at padded places is never read: they come last, and attention looks back.
        ids = pad(rows, batch_first=True).to(self.model.device)  # (B, T)
        attention = pad([torch.ones_like(row) for row in rows], batch_first=True).to(self.model.device)
        labels = ids.masked_fill(attention == 0, -100)
        for row, head in zip(labels, heads, strict=True):
            row[:head] = -100
        outputs = self.model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        log_probs = outputs.log_probs.float().cpu()  # (B, T - 1): of the token that follows
        return [
            log_probs[place, head - 1 : len(row) - 1].tolist()
            for place, (row, head) in enumerate(zip(rows, heads, strict=True))
        ]


class ServedTeacher:
    """
    Scores with a vLLM server, through TRL's client, at a temperature that the server is seen to score at; with `top_k` the
    server's likeliest tokens too, of a vocabulary that ends at `vocab_size`.
    """

    name = "vllm"

    def __init__(
        self,
        url: str,
        batch_size: int = 16,
        connection_timeout: float = 60.0,
        temperature: float = 1.0,
        top_k: int = 0,
        vocab_size: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
        self.url, self.batch_size, self.temperature = url, batch_size, temperature
        self.top_k, self.vocab_size = min(top_k, vocab_size), vocab_size
        self.client = teacher_client(url.rstrip("/"), connection_timeout)
        if self.top_k:
            self._check_grant()
        check_temperature(self.client, url, temperature)

    @property
    def model(self) -> str:
        """Name of the model that is served."""
        return self.client.model

    def __call__(self, rollouts: Sequence[Rollout]) -> Iterator[list[list[float]]]:
        for start in range(0, len(rollouts), self.batch_size):
            answer = self._ask(rollouts[start : start + self.batch_size])
            yield [[value for (value,) in row] for row in answer["actual_logprobs"]]

    def score(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of rollouts, asked about at once: its tokens and the `top_k` likeliest ones, as [`batch_of`] puts them."""
        mask = batch["completion_mask"].bool()
        asked = [rollout for rollout in rollouts_in(batch) if rollout.completion_ids]
        answer = self._ask(asked, self.top_k) if asked else {}

        def tokens(name: str, kind: torch.dtype, width: int) -> torch.Tensor:
            rows = [token for row in answer.get(name, ()) for token in row]
            return torch.tensor(rows, dtype=kind, device=mask.device).view(-1, width)

        scores = TeacherScores(
            tokens("actual_logprobs", torch.float32, 1).squeeze(1),
            tokens("logprob_token_ids", torch.int64, self.top_k),
            tokens("logprobs", torch.float32, self.top_k),
        )
        self._check_scores(scores)
        return batch_of(scores, mask)

    def _ask(self, rollouts: Sequence[Rollout], top_k: int = 1) -> dict[str, Any]:
        # The token itself is always among the answers, whatever its rank.
        rows = [each.prompt_ids + each.completion_ids for each in rollouts]
        lengths = [len(each.prompt_ids) for each in rollouts]
        return self.client.get_sequence_logprobs(rows, lengths, top_logprobs=top_k, temperature=self.temperature)

    def _check_grant(self) -> None:
        advice = f"Start it with `--max-logprobs {self.top_k}` or more, or lower `aopd_top_k`"
        asked = f"{self.top_k} log-probabilities for each token"
        try:
            found = self.client.get_sequence_logprobs([[0, 0]], [1], top_logprobs=self.top_k)
        except Exception as error:  # TRL's client raises nothing narrower
            raise ValueError(f"The teacher's server at {self.url} refuses {asked}: {error}. {advice}.") from error
        granted = int(torch.tensor(found["logprobs"]).isfinite().sum())
        if granted < self.top_k:
            raise ValueError(f"The teacher's server at {self.url} grants {granted} of {asked}. {advice}.")

    def _check_scores(self, scores: TeacherScores) -> None:
        beyond = scores.top_ids[scores.top_ids >= self.vocab_size]
        if len(beyond):
            raise ValueError(
                f"The teacher's server at {self.url} named token {int(beyond.max())}, and the student's vocabulary has "
                f"{self.vocab_size}. Use a teacher with the student's tokenizer, or a lower `aopd_top_k`."
            )
        missing = ~(scores.log_probs.isfinite() & scores.top_log_probs.isfinite().all(-1))
        if missing.any():
            raise ValueError(
                f"The teacher's server at {self.url} gave no score for {int(missing.sum())} of {len(missing)} tokens. "
                f"It must return the sampled token and its {self.top_k} likeliest ones."
            )


def check_temperature(client: Any, url: str, temperature: float) -> None:
    """Refuse a server that scores at another temperature than it is asked: which it does depends on how it was started."""
    if temperature == 1.0:
        return
    # The distance of two tokens' log-probabilities is that at temperature 1 divided by the temperature.
    gaps = []
    for asked in (1.0, temperature):
        answer = client.get_sequence_logprobs([[0, 1, 2, 3]], [1], top_logprobs=2, temperature=asked)
        gaps.append(max(first - second for first, second in answer["logprobs"][0]))
    if abs(gaps[1] * temperature - gaps[0]) > 1e-2 * abs(gaps[0]):
        raise ValueError(
            f"The teacher's server at {url} scores at another temperature than {temperature}, which it was asked for. Start it "
            "with `--logprobs-mode processed_logprobs`, or set `temperature` to 1."
        )


class StoredScores:
    """Scores that rollouts were stored with (`trl-bridge data score-rollouts`), found by their tokens."""

    name = "stored scores"

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase):
        reader = Dataset.from_parquet if path.endswith(".parquet") else Dataset.from_json
        rows: Any = reader(path)
        missing = [
            name
            for name in ("prompt_ids", "completion_ids", "teacher_logprobs", "scored_with")
            if name not in rows.column_names
        ]
        if missing:
            raise ValueError(
                f"{path} has no column `{missing[0]}`: it must be what `trl-bridge data score-rollouts` writes."
            )
        check_identity(set(rows["scored_with"]), tokenizer, False, path)
        self.path = path
        self._scores = {
            (tuple(row["prompt_ids"]), tuple(row["completion_ids"])): row["teacher_logprobs"] for row in rows
        }

    def __call__(self, rollouts: Sequence[Rollout]) -> Iterator[list[list[float]]]:
        yield [self._find(rollout) for rollout in rollouts]

    def _find(self, rollout: Rollout) -> list[float]:
        key = (tuple(rollout.prompt_ids), tuple(rollout.completion_ids))
        if key not in self._scores:
            raise ValueError(
                f"{self.path} has no scores of a rollout that was sampled just now. Stored scores are for rollouts that are "
                "stored too (`rollout_func`); for fresh ones take the teacher itself."
            )
        return self._scores[key]


def check_scores(rollout: Rollout, scores: Sequence[float], where: str) -> None:
    """Refuse scores that training could not use."""
    if len(scores) != len(rollout.completion_ids):
        raise ValueError(f"{where} has {len(rollout.completion_ids)} completion tokens and {len(scores)} scores.")
    if not scores:
        raise ValueError(f"{where} has an empty completion.")
    # A bit above 0 is rounding.
    wrong = next((place for place, score in enumerate(scores) if not math.isfinite(score) or score > 1e-3), None)
    if wrong is not None:
        raise ValueError(
            f"{where}: the score of completion token {wrong} is {scores[wrong]}, which is no log-probability. A server that "
            "keeps the first k tokens alone answers -inf for the others: it must return the sampled token's."
        )
