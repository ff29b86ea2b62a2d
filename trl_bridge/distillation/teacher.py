"""Who scores the rollouts: the heads of local models, and a teacher on a vLLM server."""

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from .._upstream import served_log_probs, teacher_client
from ..objectives.lm_head import Head, TeacherScores


logger = logging.get_logger(__name__)


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, under the names that transformers' models have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return value
    # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def head_of(model: Any, temperature: float) -> Head:
    """The head of a causal language model."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), logit_scale(config), softcap, temperature)


def check_tokenizers(
    student: PreTrainedTokenizerBase, teacher: str, revision: str | None, trust_remote_code: bool
) -> None:
    """
    Refuse a teacher whose tokens mean something else: equal sizes of the vocabulary, which TRL asks for, say little.
    """
    # Without one, transformers makes an empty tokenizer from the model's config.
    if not get_tokenizer_config(teacher, revision=revision):
        logger.warning(
            f"No tokenizer is stored with the teacher {teacher!r}, so it is not compared with the student's."
        )
        return
    other = AutoTokenizer.from_pretrained(teacher, revision=revision, trust_remote_code=trust_remote_code)
    ours, theirs = student.get_vocab(), other.get_vocab()
    differing = [token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)]
    if differing:
        token = differing[0]
        raise ValueError(
            f"The teacher {teacher!r} has another tokenizer than the student: {len(differing)} tokens differ, among them "
            f"{token!r} (student: {ours.get(token)}, teacher: {theirs.get(token)}). Use a teacher of the same family, or "
            "TRL's GOLD trainer across tokenizers."
        )


class TeacherServer:
    """A teacher on a vLLM server, asked through TRL's own client once for each generation batch."""

    # Read by TRL's method, beside the client and K.
    temperature = 1.0

    def __init__(self, url: str, timeout: float, top_k: int, vocab_size: int):
        self.url, self.vocab_size = url, vocab_size
        self.loss_top_k = min(top_k, vocab_size)
        self.teacher_client = teacher_client(url, timeout)
        self._check_grant()

    def _check_grant(self) -> None:
        advice = f"Start it with `--max-logprobs {self.loss_top_k}` or more, or lower `aopd_top_k`"
        asked = f"{self.loss_top_k} log-probabilities for each token"
        try:
            found = self.teacher_client.get_sequence_logprobs([[0, 0]], [1], top_logprobs=self.loss_top_k)
        except Exception as error:  # TRL's client raises nothing narrower
            raise ValueError(f"The teacher's server at {self.url} refuses {asked}: {error}. {advice}.") from error
        granted = int(torch.tensor(found["logprobs"]).isfinite().sum())
        if granted < self.loss_top_k:
            raise ValueError(f"The teacher's server at {self.url} grants {granted} of {asked}. {advice}.")

    def score(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Ask the server about a batch of rollouts."""
        answer = served_log_probs(self, batch)
        mask = batch["completion_mask"].bool()
        names = {"actual_logprobs": "log_probs", "topk_token_ids": "top_ids", "topk_logprobs": "top_log_probs"}
        scores = {}
        for theirs, ours in names.items():
            value = answer[theirs]
            full = value.new_zeros((*mask.shape, *value.shape[2:]))
            full[:, : value.size(1)] = value
            scores[f"teacher_{ours}"] = full.masked_fill(~mask.view(*mask.shape, *[1] * (value.dim() - 2)), 0)
        if bool((scores["teacher_top_ids"] >= self.vocab_size).any()):
            raise ValueError(
                f"The teacher's server at {self.url} named token {int(scores['teacher_top_ids'].max())}, and the student's "
                f"vocabulary has {self.vocab_size}. Use a teacher with the student's tokenizer, or a lower `aopd_top_k`."
            )
        missing = ~(scores["teacher_log_probs"].isfinite() & scores["teacher_top_log_probs"].isfinite().all(-1))
        if missing.any():
            raise ValueError(
                f"The teacher's server at {self.url} gave no score for {int(missing.sum())} of {int(mask.sum())} tokens. "
                f"It must return the sampled token and its {self.loss_top_k} likeliest ones."
            )
        return scores


def scores_in(batch: dict[str, torch.Tensor], mask: torch.Tensor, top_k: int) -> TeacherScores:
    """What [`TeacherServer.score`] has put into a batch, as the objectives read it."""
    top = [batch[name][mask][:, :top_k] for name in ("teacher_top_ids", "teacher_top_log_probs")]
    return TeacherScores(batch["teacher_log_probs"][mask], *top)
