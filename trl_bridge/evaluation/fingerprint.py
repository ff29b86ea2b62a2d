"""Telling one model from another that was saved at the same path."""

import hashlib
from pathlib import Path
from typing import Any


__all__ = ["model_fingerprint", "model_identity"]

_TAIL = 2**20
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")


def model_fingerprint(directory: Path) -> str:
    """
    Hash of the names, the sizes and the last MiB of the weight files of a model directory.

    Training moves every weight, so the end of each file tells two models apart without reading gigabytes.

    Args:
        directory (`Path`):
            Directory of a model or an adapter.

    Returns:
        `str`: 16 hexadecimal digits.

    Raises:
        FileNotFoundError: the directory holds no weights.
    """
    files = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    if not files:
        raise FileNotFoundError(f"`model`: {directory} holds no weights (*.safetensors or pytorch_model*.bin)")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            file.seek(max(0, size - _TAIL))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def model_identity(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    What tells a model apart from another one of the same name, its weights not loaded.

    Args:
        name (`str`):
            Directory, or name on the hub.
        options (`dict[str, Any]`):
            `revision`, `trust_remote_code`, as transformers takes them.

    Returns:
        `dict[str, Any]`: `weights`, the fingerprint of a directory, and `revision`, the commit on the hub; each where
        there is one.
    """
    from transformers import AutoConfig

    found: dict[str, Any] = {}
    if Path(name).is_dir():
        found["weights"] = model_fingerprint(Path(name))
    if not (Path(name) / "adapter_config.json").is_file():
        # An adapter's directory has no config of its own.
        commit = getattr(AutoConfig.from_pretrained(name, **options), "_commit_hash", None)
        found |= {} if commit is None else {"revision": commit}
    return found
