"""
The folder `bridge/` inside `checkpoint-N`: what an exact resume needs besides TRL's own checkpoint.

A marker is written last. A checkpoint counts as complete when the marker and TRL's own state file agree, so one that was
cut off half-way is recognised and passed over.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .layout import RANKS
from .registry import LOCAL, SHARDED, SHARED, Registry


logger = logging.get_logger(__name__)

FOLDER = "bridge"
_MARKER = "complete.json"
# Keys are spelt as in the checkpoints that there are, and shown by the field's word.
_SHOWN = {"way of training": "backend"}

T = TypeVar("T")


def discard_marker(checkpoint: Path) -> None:
    """Unmark a checkpoint folder that is about to be written over."""
    (checkpoint / FOLDER / _MARKER).unlink(missing_ok=True)


def write(
    checkpoint: Path,
    accelerator: Accelerator,
    saved: Registry,
    step: int,
    parts: Callable[[Path], list[str]],
) -> None:
    """Write `bridge/`. Collective: every rank calls."""
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    sharded = saved.parts[SHARDED]
    rest = {name: part.rest() for name, part in sharded.items()}
    torch.save({**saved.state(LOCAL), "rows": rest}, folder / f"rank-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        torch.save(saved.state(SHARED), folder / f"{SHARED}.pt")
    for name, part in sharded.items():
        part.save(folder / name)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pieces = [f"{FOLDER}/{name}/{file.name}" for name in sharded for file in sorted((folder / name).iterdir())]
        marker = {
            "global_step": step,
            "layout": saved.layout,
            "requirements": saved.requirements,
            "first_start": saved.first_start,
            "parts": [*parts(checkpoint), *pieces],
        }
        partial = folder / (_MARKER + ".partial")
        partial.write_text(json.dumps(marker, indent=2))
        partial.replace(folder / _MARKER)
    accelerator.wait_for_everyone()


def read(checkpoint: Path, saved: Registry, rank: int) -> None:
    """Load all parts. Collective."""
    layout = layout_of(checkpoint)
    same = layout == saved.layout
    local = {r: _load(checkpoint, f"rank-{r}") for r in ([rank] if same else range(layout[RANKS]))}
    own = local[rank if layout[RANKS] == saved.layout[RANKS] else 0]
    for name, part in saved.parts[LOCAL].items():
        resharded = not same and name in saved.reshard
        states = [state[name] for state in local.values()]
        part.load_state_dict(saved.reshard[name](states, layout) if resharded else own[name])
    shared = _load(checkpoint, SHARED)
    for name, part in saved.parts[SHARED].items():
        part.load_state_dict(shared[name])
    for name, part in saved.parts[SHARDED].items():
        part.load(checkpoint / FOLDER / name, own["rows"][name])


def read_weights(checkpoint: Path, saved: Registry) -> None:
    """Load only what belongs to the weights. Collective."""
    shared = _load(checkpoint, SHARED)
    for name in saved.of_weights:
        saved.parts[SHARED][name].load_state_dict(shared[name])
    for name, part in saved.parts[SHARDED].items():
        part.load_weights(checkpoint / FOLDER / name)


def _load(checkpoint: Path, name: str) -> dict[str, Any]:
    return torch.load(checkpoint / FOLDER / f"{name}.pt", map_location="cpu", weights_only=True)


def layout_of(checkpoint: Path) -> dict[str, int]:
    """How the run that wrote a checkpoint cut its updates into ranks and micro-batches."""
    return _marker(checkpoint)["layout"]


def first_start_of(checkpoint: Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint decided at its first start."""
    return {} if missing_part(checkpoint) is not None else _marker(checkpoint).get("first_start", {})


def _marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / FOLDER / _MARKER).read_text())


def missing_part(checkpoint: Path) -> str | None:
    """What a checkpoint lacks for an exact resume."""
    try:
        marker = _marker(checkpoint)
    except FileNotFoundError:
        return f"{FOLDER}/{_MARKER}"
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return TRAINER_STATE_NAME
    if state["global_step"] != marker["global_step"]:
        return f"{FOLDER}/{_MARKER} of step {state['global_step']} (it is of step {marker['global_step']})"
    if "layout" not in marker:
        return f"the layout in {FOLDER}/{_MARKER} (it is of an earlier release)"
    ranks = range(marker["layout"][RANKS])
    names = [f"{FOLDER}/shared.pt", *(f"{FOLDER}/rank-{rank}.pt" for rank in ranks), *marker["parts"]]
    names += ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    # TRL's trainer passes over a missing optimizer or random state without a word.
    absent = next((name for name in names if not (checkpoint / name).is_file()), None)
    has_weights = any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("pytorch_model*.bin"))
    return absent if absent is not None or has_weights else "the model's weights"


def check(checkpoint: Path, requirements: dict[str, Any], layout: dict[str, int], bound: str | None) -> None:
    """Refuse a checkpoint that this run cannot resume from exactly."""
    if not checkpoint.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: there is no folder {str(checkpoint)!r}.")
    part = missing_part(checkpoint)
    if part is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} lacks {part}, so training cannot resume from it exactly. "
            "It was cut off while saving, saved with `save_only_model=True`, or made by another trainer. Use another "
            "checkpoint, or start a new run from its weights."
        )
    ranks, now = layout_of(checkpoint)[RANKS], layout[RANKS]
    if bound is not None and ranks != now:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was written by {ranks} ranks, and this run has {now}: {bound}. "
            f"Resume on {ranks}, or start a new run from the model that is saved there."
        )
    saved = _marker(checkpoint)["requirements"]
    # Compared as JSON: tuples and enumerations come back as lists and strings.
    wanted = json.loads(json.dumps(requirements))
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if differing:
        listed = "; ".join(
            f"`{_SHOWN.get(name, name)}` was {saved.get(name)!r}, now {wanted.get(name)!r}" for name in differing
        )
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was made with other options: {listed}. Restore them, or "
            "start a new run."
        )


def agreed(find: Callable[[], T]) -> T:
    """
    What the main process finds in a folder, on every rank. Collective.

    Ranks may see a file at different times: each by itself, one would resume from a checkpoint and another start a new
    run, and both would wait forever.
    """
    state = PartialState()
    state.wait_for_everyone()
    return broadcast_object_list([find() if state.is_main_process else None])[0]


def latest(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of an output folder; unfinished newer ones are passed over with a warning."""
    numbered = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdigit()
    ]
    for _, folder in sorted(numbered, reverse=True):
        part = missing_part(folder)
        if part is None:
            return folder
        logger.warning(f"Passing over {folder}: it lacks {part}.")
    return None
