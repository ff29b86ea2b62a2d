"""Which models, tokens and template stored scores come from: what decides whether a student can learn from them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


Identity = dict[str, Any]


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which token has which id. Equal for models that can score each other's tokens."""
    return _hash(sorted(tokenizer.get_vocab().items()))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the end-of-sequence token, which is trained on like any other."""
    return _hash([vocabulary_hash(tokenizer), tokenizer.eos_token_id])


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template; `None` where there is none."""
    return None if tokenizer.chat_template is None else _hash(tokenizer.chat_template)


def model_name(name: str) -> str:
    """A model's name such that one directory has one name: `./out/sft/` is `out/sft`."""
    return Path(name).expanduser().as_posix() if name.startswith((".", "/", "~")) or name.endswith("/") else name


def rollout_identity(
    *,
    student: dict[str, Any],
    teacher: dict[str, Any],
    sft_teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    conversational: bool,
    chat_template_kwargs: dict[str, Any],
    sampling: dict[str, Any],
) -> Identity:
    """What is stored beside each scored rollout, in the column `scored_with`, as JSON."""
    return {
        "student": student,
        "teacher": teacher,
        "sft_teacher": model_name(sft_teacher),
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": template_hash(tokenizer) if conversational else None,
        "chat_template_kwargs": chat_template_kwargs if conversational else {},
        "sampling": sampling,
    }


def check_identity(
    found: Iterable[str], tokenizer: PreTrainedTokenizerBase, require_same_teacher: bool, what: str
) -> list[Identity]:
    """Refuse scores that were made for another student."""
    identities = []
    for text in sorted(found):
        identity = parsed(text, what)
        _refuse_if_different("tokenizer", identity["tokenizer"], tokenizer_hash(tokenizer), identity, what)
        if identity["chat_template"] is not None:
            _refuse_if_different("chat template", identity["chat_template"], template_hash(tokenizer), identity, what)
        teacher = identity["teacher"]["model"]
        if require_same_teacher and teacher != identity["sft_teacher"]:
            raise ValueError(
                f"`{what}` was scored by {teacher!r}, and the student's SFT data was written by "
                f"{identity['sft_teacher']!r}: with another teacher offline distillation pulls towards neither. Score the "
                f"rollouts with {identity['sft_teacher']!r}, or set `require_same_teacher=False`."
            )
        identities.append(identity)
    return identities


def _refuse_if_different(part: str, stored: str, own: str | None, identity: Identity, what: str) -> None:
    if stored != own:
        raise ValueError(
            f"`{what}` was sampled by {identity['student']['model']!r} with another {part} ({stored}) than this "
            f"student's ({own}): its token ids would mean something else here. Take the student that sampled, or make the "
            "rollouts again with `trl-bridge data score-rollouts`."
        )


def parsed(text: str, what: str) -> Identity:
    """What a row's `scored_with` says."""
    try:
        identity = json.loads(text)
        missing = {"student", "teacher", "sft_teacher", "tokenizer", "chat_template"} - identity.keys()
        if missing or not isinstance(identity["teacher"]["model"], str):
            raise KeyError(*missing)
        identity["student"]["model"]  # noqa: B018
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"`{what}`: the column `scored_with` does not say who sampled and scored its rows ({text[:80]!r}): make them "
            "with `trl-bridge data score-rollouts`."
        ) from error
    return identity


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
