"""
Goes on with the checkpoints of other runs, on the ranks that it is started on. Usage: rank.py run_ranks KIND UPDATES FROM TO

FROM holds `NAME straight/checkpoint-UPDATES` for each run NAME that is resumed, and TO gets the same.
"""

import os
from pathlib import Path

from tests.distributed.cases import RESUMES
from tests.distributed.run import SAVING, Watch, pretend_accelerator, trainer_of, write_seen


# The update after which the run is handed on once more.
AGAIN = 5


def go_on(kind: str, updates: int, source: Path, target: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for name, options in RESUMES[kind].items():
        # As many rows in an update and in a generation batch as two ranks have.
        cut = {"gradient_accumulation_steps": 4 // ranks}
        if "steps_per_generation" in options:
            cut["steps_per_generation"] = 8 // ranks
        place = target / f"{name} straight"
        trainer = trainer_of(place, {**SAVING, **options, **cut}, callbacks=[Watch({AGAIN})])
        trainer.train(resume_from_checkpoint=str(source / place.name / f"checkpoint-{updates}"))
        write_seen(trainer, place)


def main(kind: str, updates: str, source: str, target: str) -> None:
    if kind != "ddp":
        pretend_accelerator()
    go_on(kind, int(updates), Path(source), Path(target))
