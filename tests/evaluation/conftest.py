import json
from pathlib import Path

import pytest

from trl_bridge.generation.generate import Generated
from trl_bridge.models import tiny_model, tiny_tokenizer


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def tiny():
    tokenizer = tiny_tokenizer(chat_template=True)
    return tiny_model(tokenizer, hidden_size=32, layers=2), tokenizer


@pytest.fixture(autouse=True)
def quick_batches(monkeypatch):
    """Without the collection of garbage before each batch, which costs these small batches more than the model."""
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)


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
