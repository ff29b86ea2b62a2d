"""
Consultants that a policy may ask while it answers: one verifies, one looks up, one reasons. An environment for TRL's tool loop.

In the spirit of AIPO (arXiv 2605.08401). That paper's importance coefficient, clipping and prompts are not public, so this is not AIPO:
what a consultant says is context here, as any tool's result, and has no part in the loss.
"""

import json
import urllib.request
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.engines import Sampling, generate_batch, prompt_ids
from ..rewards.calling import call_reward
from ..rewards.completions import warn_once


class Consultants:
    """
    Three tools of a rollout: `verify`, `knowledge` and `reasoning`.

    A trainer makes one for each rollout: `environment_factory=functools.partial(Consultants, reward, knowledge, reasoning)`.

    `verify` says whether an answer is right, and nothing else: neither how near it is nor, if the reward function fails, what the
    error says, since both may hold the row's own answer. Each verdict rules answers out, so that there are `verdicts` of them.

    Args:
        reward (`Callable`):
            Judge, called as training calls it, with the columns of the rollout's row.
        knowledge (`Callable[[str], str]`):
            What is found for a query, such as [`SearchEngine.search`].
        reasoning (`Callable[[str], str]`):
            What another model says, such as [`local_model`] or [`served_model`].
        verdicts (`int`, *optional*, defaults to `1`):
            Most verdicts of a rollout.
        threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which an answer is right.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        knowledge: Callable[[str], str],
        reasoning: Callable[[str], str],
        verdicts: int = 1,
        threshold: float = 1.0,
    ):
        self._reward, self._knowledge, self._reasoning = reward, knowledge, reasoning
        self._verdicts, self._threshold = verdicts, threshold

    def reset(self, **row: Any) -> None:
        """Begin a rollout of this row."""
        self._row, self._left = row, self._verdicts

    def verify(self, answer: str) -> str:
        """
        Ask whether an answer to the question is right.

        Args:
            answer: The answer.

        Returns:
            The verdict.
        """
        if self._left == 0:
            return "no more verdicts"
        self._left -= 1
        try:
            (value,) = call_reward(self._reward, [self._row], [str(answer)], [[]], None)
        except Exception as error:
            # TRL tells the policy what an error says.
            warn_once("verify", "`verify`: the reward function failed: %r", error)
            raise RuntimeError("cannot be judged") from error
        return "cannot be judged" if value is None else "right" if value >= self._threshold else "wrong"

    def knowledge(self, query: str) -> str:
        """
        Look something up.

        Args:
            query: Words to look for.

        Returns:
            What was found.
        """
        return self._knowledge(query)

    def reasoning(self, question: str) -> str:
        """
        Ask another model.

        Args:
            question: The question.

        Returns:
            Its answer.
        """
        return self._reasoning(question)


def local_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 256
) -> Callable[[str], str]:
    """A model as a consultant: its greedy answer to a question. The global random state is left as it was."""
    model.eval()

    def ask(question: str) -> str:
        text = str(question)
        ids = prompt_ids([{"role": "user", "content": text}] if tokenizer.chat_template else text, tokenizer)
        return generate_batch(model, tokenizer, [ids], [0], Sampling(max_new_tokens))[0].text

    return ask


def served_model(url: str, model: str, max_new_tokens: int = 256, timeout: float = 60.0) -> Callable[[str], str]:
    """
    A model behind an OpenAI-compatible server (vLLM's, at `http://localhost:8000/v1`) as a consultant: its greedy answer. One that
    does not answer within `timeout` seconds has failed.
    """

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": str(question)}]
        body = {"model": model, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0.0}
        # Not huggingface_hub's client, which refuses a server on this machine too where HF_HUB_OFFLINE is set.
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)["choices"][0]["message"]["content"] or ""

    return ask
