"""What scores rollouts at hand: a model's head, and the check that its tokens are the student's."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

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
    """The head of a causal language model, within its forward. Collective where FSDP has the head in a group of its own."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    weight, bias = _full(layer.weight), _full(getattr(layer, "bias", None))
    return Head(weight, bias, logit_scale(config), softcap, temperature)


def _full(weight: Any) -> Any:
    if not isinstance(weight, DTensor):
        return weight
    if weight.requires_grad:
        # Its gradient would pass by FSDP, which averages it over the ranks.
        raise NotImplementedError(
            "An FSDP wrap policy that shards the head apart from the model is not supported. Set `fsdp_auto_wrap_policy` to "
            "TRANSFORMER_BASED_WRAP."
        )
    return weight.full_tensor()


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


def batch_of(scores: TeacherScores, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of a batch's tokens as parts of that batch; zero where the mask is."""
    parts = {f"teacher_{name}": value for name, value in scores._asdict().items()}
    return {
        name: value.new_zeros(*mask.shape, *value.shape[1:]).index_put((mask,), value) for name, value in parts.items()
    }


def scores_in(batch: dict[str, torch.Tensor], mask: torch.Tensor, top_k: int) -> TeacherScores:
    """What [`batch_of`] has put into a batch, as the objectives read it."""
    top = [batch[name][mask][:, :top_k] for name in ("teacher_top_ids", "teacher_top_log_probs")]
    return TeacherScores(batch["teacher_log_probs"][mask], *top)
