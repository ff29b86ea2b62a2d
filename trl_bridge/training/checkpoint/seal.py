"""What a marker vouches for: size and checksum of every file of a checkpoint, all of them on the disk before it."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash


# From each file's path inside the checkpoint to its size and checksum.
Files = dict[str, tuple[int, str]]

_READERS = 4


def flushed(checkpoint: Path) -> Files:
    """Size and checksum of every file of a folder, once its content is on the disk."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        _flush(path)
        files[path.relative_to(checkpoint).as_posix()] = (path.stat().st_size, _checksum(path))
    for folder in (*(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint, checkpoint.parent):
        _flush(folder)
    return files


def write_flushed(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, on the disk when this returns."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def damage(checkpoint: Path, files: Files) -> str | None:
    """What has become of a folder's files since `flushed`; `None` where they are as they were."""
    # Sizes first: they cost nothing, and most damage shows in them.
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has a damaged {name} ({path.stat().st_size} bytes of {size})"
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(_checksum, [checkpoint / name for name in files])
        for (name, (_, checksum)), now in zip(files.items(), found, strict=True):
            if now != checksum:
                return f"has a damaged {name} (its content is not what was saved)"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Background:
    """One piece of work at a time, beside training. The interpreter ends only when it is done."""

    def __init__(self) -> None:
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, once the piece before is done."""
        self.wait()
        with_end = ThreadPoolExecutor(1)
        self._work = with_end.submit(work)
        with_end.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the end; raises what the work raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
