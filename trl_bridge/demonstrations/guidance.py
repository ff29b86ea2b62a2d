"""Guidance: the first steps of a worked solution inside the prompt, and the search for as few of them as work."""

import re
from typing import Any


class GuidanceSearch:
    """
    Binary search for the least number of steps with which the policy succeeds, in a limited number of probes.

    The answer is always a length that was probed and worked. If success is monotone in the length, it is the least one
    where the probes suffice (`longest < 2 ** rounds`). The last probe is of all steps where none has worked so far.

    Args:
        longest (`int`):
            Most steps that may be shown, at least 1.
        rounds (`int`):
            Most probes.
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
        """
        Give the result of the probe.

        Raises:
            ValueError: the search is over.
        """
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


def guided_prompt(prompt: Any, steps: str, template: str) -> Any:
    """
    A prompt with guidance in it.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt; of a conversation the last user message is changed.
        steps (`str`):
            Text of the steps.
        template (`str`):
            Text with `{prompt}` and `{steps}`.

    Returns:
        `str` or `list[dict]`: another prompt of the same kind.

    Raises:
        ValueError: a conversation without a user message that is text.
    """

    def fill(text: str) -> str:
        return re.sub(r"\{(prompt|steps)\}", lambda found: text if found[1] == "prompt" else steps, template)

    if isinstance(prompt, str):
        return fill(prompt)
    for place in range(len(prompt) - 1, -1, -1):
        content = prompt[place]["content"]
        if prompt[place]["role"] == "user" and isinstance(content, list) and len(content) == 1:
            content = content[0].get("text")
        if prompt[place]["role"] == "user" and isinstance(content, str):
            return [*prompt[:place], {**prompt[place], "content": fill(content)}, *prompt[place + 1 :]]
    raise ValueError("a conversational `prompt` has no user message that is text: guidance has no place in it.")
