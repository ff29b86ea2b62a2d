"""What the cache of `datasets` must know beside the rows."""

import hashlib
from pathlib import Path
from types import ModuleType


__all__ = ["code_of"]


def code_of(*modules: ModuleType) -> dict[str, str]:
    """
    Argument that ties a cached result to the code that made it.

    `datasets` tells functions of modules apart by their names, not by what they do: without this, rows that an older
    version of trl-bridge converted would be found again by a newer one.
    """
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return {"code": digest.hexdigest()}
