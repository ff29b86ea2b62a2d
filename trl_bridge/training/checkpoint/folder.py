"""
The folder `bridge/` inside `checkpoint-N`: what an exact resume needs besides TRL's own checkpoint.

A marker is written last, when every file of the checkpoint is on the disk, and has their sizes and checksums: a checkpoint
that was cut off half-way, or damaged since, is recognised and passed over.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .drift import as_json, differences
from .layout import RANKS
from .registry import LOCAL, SHARDED, SHARED, Registry
from .seal import damage, flushed, write_flushed


logger = logging.get_logger(__name__)

FOLDER = "bridge"
MARKER = "complete.json"
# Keys are spelt as in the checkpoints that there are, and shown by the field's word.
_SHOWN = {"way of training": "backend"}

T = TypeVar("T")


def clear(checkpoint: Path, accelerator: Accelerator) -> None:
    """Take `bridge/` out of a checkpoint folder that is about to be written over, the marker first. Collective."""
    if accelerator.is_main_process:
        (checkpoint / FOLDER / MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)
    accelerator.wait_for_everyone()


def write(checkpoint: Path, accelerator: Accelerator, saved: Registry) -> None:
    """Write `bridge/` but for its marker. Every rank calls."""
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    sharded = saved.parts[SHARDED]
    rest = {name: part.rest() for name, part in sharded.items()}
    torch.save({**saved.state(LOCAL), "rows": rest}, folder / f"rank-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        torch.save(saved.state(SHARED), folder / f"{SHARED}.pt")
    for name, part in sharded.items():
        part.save(folder / name)


def seal(checkpoint: Path, step: int, description: dict[str, Any]) -> None:
    """Write the marker, once every file is on the disk. The main process calls, when all ranks have written theirs."""
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    (checkpoint / FOLDER / MARKER).unlink(missing_ok=True)  # it is no file that it speaks of
    marker = {"global_step": step, **description, "files": flushed(checkpoint)}
    marker["checksum"] = _checksum(marker)
    write_flushed(checkpoint / FOLDER / MARKER, json.dumps(marker, indent=2))


def finish(
    checkpoint: Path, step: int, description: dict[str, Any] | None, *, limit: int | None, best: str | None
) -> None:
    """What is left to do for a written checkpoint, beside training; `None` for one that is not to be resumed from."""
    if description is not None:
        seal(checkpoint, step, description)
    # Only now: until the marker stands, an older checkpoint is the one to resume from.
    rotate_checkpoints(str(checkpoint.parent), limit, best, use_mtime=True)


def _checksum(marker: dict[str, Any]) -> str:
    rest = {name: value for name, value in marker.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


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


def names_of_weights(checkpoint: Path) -> set[str]:
    """Names under which a checkpoint has the model's weights."""
    names: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def _load(checkpoint: Path, name: str) -> dict[str, Any]:
    return torch.load(checkpoint / FOLDER / f"{name}.pt", map_location="cpu", weights_only=True)


def layout_of(checkpoint: Path) -> dict[str, int]:
    """How the run that wrote a checkpoint cut its updates into ranks and micro-batches."""
    return _marker(checkpoint)["layout"]


def first_start_of(checkpoint: Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint decided at its first start."""
    return _marker(checkpoint).get("first_start", {})


def _marker(checkpoint: Path) -> dict[str, Any]:
    return _json(checkpoint / FOLDER / MARKER)


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none, or where it was cut."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from exactly; `None` where it is whole. Reads every file."""
    marker = _marker(checkpoint)
    if not marker:
        return f"lacks {FOLDER}/{MARKER}"
    has_checksums = "files" in marker or "checksum" in marker
    wrong = damaged(checkpoint) if has_checksums else None
    if wrong is None and "layout" not in marker:
        wrong = f"lacks the layout in {FOLDER}/{MARKER} (it is of an earlier release)"
    if wrong is None and not has_checksums:
        wrong = _lost(checkpoint, marker)
    if wrong is not None:
        return wrong
    state = _json(checkpoint / TRAINER_STATE_NAME)
    if not state:
        return f"has a damaged {TRAINER_STATE_NAME}"
    if state["global_step"] != marker["global_step"]:
        return f"lacks {FOLDER}/{MARKER} of step {state['global_step']} (it is of step {marker['global_step']})"
    return None


def damaged(checkpoint: Path) -> str | None:
    """What is wrong by a checkpoint's marker; `None` too where there is no marker to vouch for anything."""
    marker = _marker(checkpoint)
    if not marker:
        return f"has a damaged {FOLDER}/{MARKER}" if (checkpoint / FOLDER / MARKER).is_file() else None
    if marker.get("checksum") != _checksum(marker):
        return f"has a damaged {FOLDER}/{MARKER}"
    return damage(checkpoint, marker["files"])


def _lost(checkpoint: Path, marker: dict[str, Any]) -> str | None:
    """The file that a checkpoint lacks whose marker, of an earlier release, has no sizes and checksums."""
    ranks = range(marker["layout"][RANKS])
    names = [f"{FOLDER}/{SHARED}.pt", *(f"{FOLDER}/rank-{rank}.pt" for rank in ranks), *marker["parts"]]
    names += ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    weights = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("pytorch_model*.bin")]
    names += [TRAINER_STATE_NAME, *(file.name for file in weights)]
    # TRL's trainer passes over a missing optimizer or random state without a word.
    lost = next((name for name in names if not (checkpoint / name).is_file()), None)
    empty = next((name for name in names if lost is None and not (checkpoint / name).stat().st_size), None)
    if lost is not None or not weights:
        return f"lacks {lost or 'the weights of the model'}"
    return None if empty is None else f"has an empty {empty}"


def whole(output_dir: Path, wanted: Path | None) -> Path:
    """The checkpoint to resume from: one by its name, or the newest of a folder. Collective."""
    if wanted is None:
        found = agreed(lambda: latest(output_dir))
        if found is None:
            raise ValueError(f"`resume_from_checkpoint`: no complete checkpoint in {str(output_dir)!r}.")
        return found
    wrong = agreed(lambda: fault(wanted) if wanted.is_dir() else "is no folder")
    if wrong is not None:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(wanted)!r} {wrong}, so training cannot resume from it exactly. A checkpoint "
            "that lacks something was cut off while saving, saved with `save_only_model=True`, or made by another trainer. "
            "Use another checkpoint, or start a new run from its weights."
        )
    return wanted


def check_run(checkpoint: Path, saved: Registry) -> None:
    """Refuse a checkpoint that this run cannot resume from exactly, and say what will not be exact."""
    check(checkpoint, saved.requirements, saved.layout, saved.only_same_ranks)
    ranks, now = layout_of(checkpoint)[RANKS], saved.layout[RANKS]
    if ranks != now and PartialState().is_main_process:
        logger.warning(
            f"{checkpoint} was written by {ranks} ranks and is resumed on {now}: from "
            "the same weights, optimizer states, prompts and demonstrations, but with random numbers (of sampling "
            "and dropout) other than those of an uninterrupted run."
        )
    told = saved.description["options"]
    before = _marker(checkpoint).get("options")
    changed = differences(told if before is None else before, told)
    if before is None and told.get("padding_free") and PartialState().is_main_process:
        logger.warning(
            f"{checkpoint} is of an earlier release, which computed with padding: `padding_free=False` goes on to the bit."
        )
    if changed and PartialState().is_main_process:
        logger.warning(
            f"Resumed with other options than {checkpoint} was made with, which count from here on: {'; '.join(changed)}."
        )


def say_what_is_there(output_dir: Path) -> None:
    """Before a run that resumes nothing: that it writes among the checkpoints of another."""
    earlier = numbered(output_dir)
    if earlier and PartialState().is_main_process:
        logger.warning(
            f"`output_dir`: {str(output_dir)!r} holds an earlier run's checkpoints (up to {earlier[0].name}), and this run "
            "starts anew and writes among them. `resume_from_checkpoint=True` would go on from there; take another folder "
            "to keep the two apart."
        )


def check(checkpoint: Path, requirements: dict[str, Any], layout: dict[str, int], bound: str | None) -> None:
    """Refuse a checkpoint of another run than this one."""
    ranks, now = layout_of(checkpoint)[RANKS], layout[RANKS]
    if bound is not None and ranks != now:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was written by {ranks} ranks, and this run has {now}: {bound}. "
            f"Resume on {ranks}, or start a new run from the model that is saved there."
        )
    marker = _marker(checkpoint)
    wanted = as_json(requirements)
    if "options" not in marker:  # of an earlier release, which compared less
        wanted = {name: value for name, value in wanted.items() if name in marker["requirements"]}
    differing = differences(_shown(marker["requirements"]), _shown(wanted))
    if differing:
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was made with other options: {'; '.join(differing)}. Restore "
            "them, or start a new run."
        )


def _shown(requirements: dict[str, Any]) -> dict[str, Any]:
    return {_SHOWN.get(name, name): value for name, value in requirements.items()}


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
    """The newest whole checkpoint of an output folder; others are passed over with a warning."""
    for folder in numbered(output_dir):
        wrong = fault(folder)
        if wrong is None:
            return folder
        logger.warning(f"Passing over {folder}: it {wrong}.")
    return None


def numbered(output_dir: Path) -> list[Path]:
    """All checkpoints of an output folder, the newest first."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbers = {path: path.name.rpartition("-")[2] for path in found}
    return sorted((path for path in found if numbers[path].isdigit()), key=lambda path: -int(numbers[path]))
