"""Rollouts under guided prompts: which groups get them, with how many steps, and the sampling itself."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from ..demonstrations.group import Experts
from ..training.group import ExpertPlan
from ..training.verdicts import AskRewards


class GuidanceSearch:
    """
    Binary search for the least number of steps with which the policy succeeds, in a limited number of probes.

    The answer is always a length that was probed and worked. If success is monotone in the length, it is the least one
    where the probes suffice (`longest < 2 ** rounds`). The last probe is of all steps where none has worked so far.
    """

    def __init__(self, longest: int, rounds: int):
        self.longest = longest
        self._left = rounds
        self._low, self._high = 1, longest + 1  # the least length that works is among these; the last one means none

    @property
    def probe(self) -> int | None:
        """Number of steps to try now, from 1; `None` when the search is over."""
        if self._left == 0 or self._low >= self._high:
            return None
        if self._left == 1 and self.found is None:
            return self.longest
        return (self._low + self._high) // 2

    def tell(self, works: bool) -> None:
        """Give the result of the probe."""
        tried = self.probe
        if tried is None:
            raise ValueError("The search is over: there is no probe to tell the result of.")
        self._left -= 1
        if works:
            self._high = tried
        else:
            self._low = tried + 1

    @property
    def found(self) -> int | None:
        """The shortest length that was seen to work; `None` where none was."""
        return self._high if self._high <= self.longest else None


def guided_prompt(prompt: Any, guidance: str, template: str, name: str = "steps") -> Any:
    """A prompt with guidance in it: a template with {prompt} and {`name`}."""

    def fill(text: str) -> str:
        pattern = rf"\{{(prompt|{name})\}}"
        return re.sub(pattern, lambda found: text if found[1] == "prompt" else guidance, template)

    if isinstance(prompt, str):
        return fill(prompt)
    for place in range(len(prompt) - 1, -1, -1):
        content = prompt[place]["content"]
        if prompt[place]["role"] == "user" and isinstance(content, list) and len(content) == 1:
            content = content[0].get("text")
        if prompt[place]["role"] == "user" and isinstance(content, str):
            return [*prompt[:place], {**prompt[place], "content": fill(content)}, *prompt[place + 1 :]]
    raise ValueError("a conversational `prompt` has no user message that is text: guidance has no place in it.")


class Sample(NamedTuple):
    """A rollout: its tokens, their log-probabilities where the sampler reports them; with tools which are own ones, and its turns."""

    ids: list[int]
    log_probs: list[Any] | None = None
    own: list[int] | None = None
    turns: list[dict[str, Any]] | None = None


@dataclasses.dataclass
class Guidance:
    """Guidance of a generation batch. All but `samples` is the same on every rank."""

    own: torch.Tensor
    hard: torch.Tensor
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    probes: int = 0
    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class GuidedRollouts:
    """
    Finds guidance for the hard groups of a generation batch and samples under it. Its methods are collective.

    A group's guided rollouts are sampled by the rank that has its first row, and ranks with fewer of them sample a
    filler, so that all of them make the same calls with the same number of rows, and the rows of one prompt are
    neighbours (vLLM's server is asked for each prompt once).
    """

    plan: ExpertPlan
    experts: Experts
    own: torch.Tensor  # (groups over all ranks, G): rewards of the batch's own rollouts
    hard_threshold: float
    show_last_step: bool
    probe_rounds: int
    probe_rollouts: int
    template: str
    tokenizer: PreTrainedTokenizerBase
    tokenize: Callable[[Any], list[int]]  # of a prompt
    decode_for: Callable[[Any, list[int], list[int]], Any]  # of a prompt, its tokens and a completion's
    sample: Callable[[list[list[int]], int], list[Sample]]  # of prompts' tokens, so many neighbours of one prompt
    ask: AskRewards

    def __post_init__(self) -> None:
        self._first_rows = {group: row for row, group in enumerate(self.plan.groups) if self.plan.members[row] == 0}

    def find(self) -> Guidance:
        """Guidance for the batch."""
        own, threshold = self.own, self.hard_threshold
        unknown = torch.isnan(own)
        # A group that nobody could score is not known to be hard.
        hard = (own.masked_fill(unknown, -torch.inf).amax(dim=1) <= threshold) & ~unknown.all(dim=1)
        counts = [
            (group, count)
            for group, row in self._first_rows.items()
            if hard[group] and (count := len(self._step_ends(row)) - (not self.show_last_step)) > 0
        ]
        found = Guidance(own, hard, steps=dict(sorted(gather_object(counts))))
        searches = {group: GuidanceSearch(count, self.probe_rounds) for group, count in found.steps.items()}
        while jobs := {group: s.probe for group, s in searches.items() if s.probe is not None}:
            best = self._probe(jobs)
            found.probes += len(jobs)
            for group in jobs:
                searches[group].tell(best[group] > threshold)
        found.lengths = {group: s.found for group, s in searches.items() if s.found is not None}
        if found.lengths:
            samples = dict(gather_object(list(self._sample(found.lengths, own.size(1)).items())))
            found.samples = {
                row: samples[group][member]
                for row, (group, member) in enumerate(zip(self.plan.groups, self.plan.members, strict=True))
                if group in samples
            }
        return found

    def prompt_ids(self, row: int, steps: int) -> list[int]:
        """Tokens of a row's prompt with guidance."""
        trace = self.plan.experts[row] or []
        shown = trace[: self._step_ends(row)[steps - 1]]
        text = self.tokenizer.decode(shown, skip_special_tokens=True).strip()
        return self.tokenize(guided_prompt(self.plan.inputs[row]["prompt"], text, self.template))

    def decode(self, row: int, sample: Sample) -> Any:
        """A completion of a row's prompt as reward functions see it."""
        prompt = self.plan.inputs[row]["prompt"]
        return sample.turns or self.decode_for(prompt, self.tokenize(prompt), sample.ids)

    def example(self, row: int, sample: Sample) -> dict[str, Any]:
        """A completion of a row's prompt with what the reward functions are asked with."""
        inputs = self.plan.inputs[row]
        return {
            "inputs": inputs,
            "prompt": inputs["prompt"],
            "completion": self.decode(row, sample),
            "completion_ids": sample.ids,
        }

    def filler(self) -> dict[str, Any]:
        """An example for a rank that has fewer of them than another."""
        return self.example(0, Sample([self.tokenizer.eos_token_id]))

    def _step_ends(self, row: int) -> list[int]:
        trace = self.plan.experts[row]
        if trace is None:
            return []
        prompt = self.plan.inputs[row]["prompt"]
        ends = self.experts.step_ends(prompt, self.plan.generation, self.plan.groups[row])
        return [end for end in ends if end <= len(trace)]

    def _sample(self, lengths: dict[int, int], count: int) -> dict[int, list[Sample]]:
        """`count` rollouts of each group whose first row this rank has, under guidance of these lengths."""
        mine = [group for group in lengths if group in self._first_rows]
        size = max(gather_object([len(mine)]))
        prompts = [self.prompt_ids(self._first_rows[group], lengths[group]) for group in mine]
        prompts += [self.tokenize(self.plan.inputs[0]["prompt"])] * (size - len(mine))
        repeated = [ids for ids in prompts for _ in range(count)]
        samples = self.sample(repeated, count)
        return {group: samples[place * count : (place + 1) * count] for place, group in enumerate(mine)}

    def _probe(self, jobs: dict[int, int]) -> dict[int, float]:
        """Best reward of a probe of each group, on every rank; minus infinity where nobody could score it."""
        samples = self._sample(jobs, self.probe_rollouts)
        groups = [group for group, rollouts in samples.items() for _ in rollouts]
        examples = [
            self.example(self._first_rows[group], sample) for group, rollouts in samples.items() for sample in rollouts
        ]
        asked = self.ask(examples, self.filler())
        best = dict.fromkeys(jobs, -torch.inf)
        for group, reward in gather_object(list(zip(groups, asked, strict=True))):
            best[group] = max(best[group], reward if reward == reward else -torch.inf)
        return best
