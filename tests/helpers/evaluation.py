"""What the tests of evaluation share: stored completions, an engine that answers by a script, and held-out questions."""

import json
from pathlib import Path

from datasets import Dataset

from trl_bridge.generation.engines import Generated


def held_out(count=6):
    return Dataset.from_dict(
        {"prompt": [f"{i}+{i}=" for i in range(count)], "solution": [str(2 * i) for i in range(count)]}
    )


FIXTURES = Path(__file__).parents[1] / "evaluation" / "fixtures"


class ScriptedEngine:
    """Answers from a function of question and sample; dies after a number of completions if told so."""

    name = "scripted"

    def __init__(self, answer, batch_size=3, dies_after=None):
        self.answer, self.batch_size, self.dies_after = answer, batch_size, dies_after
        self.drawn = []

    def __call__(self, jobs, sampling):
        for start in range(0, len(jobs), self.batch_size):
            if self.dies_after is not None and len(self.drawn) >= self.dies_after:
                raise KeyboardInterrupt
            batch = jobs[start : start + self.batch_size]
            self.drawn += [(job.question, job.sample) for job in batch]
            yield [Generated(self.answer(job.question, job.sample), 5, False) for job in batch]


def stored(name):
    lines = (FIXTURES / "completions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
