"""What is put around a question: prompt templates by name, or as a string with `{prompt}`."""

import difflib
import sys
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from .cache import code_of


__all__ = ["TEMPLATES", "Template", "find_template", "with_prompt_template", "without_open_think"]

_SLOT = "{prompt}"
_PLAIN = "plain:"
_THINK = "<think>"


class Template(NamedTuple):
    """A prompt template."""

    text: str
    plain: bool = False


TEMPLATES: dict[str, Template] = {
    "boxed": Template("{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."),
    "qwen-boxed": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{prompt}\nPlease reason step by "
        "step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n",
        plain=True,
    ),
    "abel": Template("Question:\n{prompt}\nAnswer:\nLet's think step by step.", plain=True),
    "knights-knaves": Template(
        "{prompt}\n\nPlease reason step by step. At the end state everybody's role within <answer> </answer> tags, for "
        "example: <answer> (1) Zoey is a knight (2) Oliver is a knave </answer>."
    ),
}
r"""
Templates by name.

- `boxed`: SimpleRL's and Qwen's instruction, in the user's message; the model's own chat template goes around it.
- `qwen-boxed`: the same as SimpleRL's finished prompt in Qwen's chat format, for models whose own template differs.
- `abel`: SimpleRL's format for models that do not follow instructions.
- `knights-knaves`: everybody's role between answer tags, as `trl-bridge eval` asks for it too.
"""


def find_template(template: str) -> Template:
    """A template by name, or one's own."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if _SLOT in template:
        return Template(template.removeprefix(_PLAIN), plain=template.startswith(_PLAIN))
    nearest = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are: {', '.join(TEMPLATES)}"
    raise ValueError(f"`prompt_template`: no template is called {template!r} ({hint}), and it has no {_SLOT}")


def with_prompt_template(dataset: Dataset | IterableDataset, template: str) -> Dataset | IterableDataset:
    """
    Put every question into a template.

    A string prompt is the question; of a conversation, the content of the last user message is. A plain template makes
    strings of conversations that consist of a single user message, and of their completions and experts.
    """
    found = find_template(template)
    present = list(dataset.column_names or [])
    prompts = "prompt" if "prompt" in present else "messages"
    if prompts not in present or (found.plain and prompts == "messages"):
        needed = "a `prompt` column" if found.plain else "a `prompt` or `messages` column"
        raise ValueError(f"`prompt_template: {template}` needs {needed}; there is: {', '.join(present)}")
    changed = [column for column in (prompts, "completion", "expert") if column in present]

    def convert(row: dict[str, Any], code: str) -> dict[str, Any]:
        prompt = _filled(row[prompts], found)
        answers = {column: row[column] for column in changed if column != prompts}
        if found.plain:
            answers = {column: _plain_answer(value) for column, value in answers.items()}
        if isinstance(prompt, str):
            answers = {column: _without_open_think(value, prompt) for column, value in answers.items()}
        return {prompts: prompt, **answers}

    return dataset.map(convert, fn_kwargs=code_of(sys.modules[__name__]), remove_columns=changed)


def without_open_think(trace: str, prompt: str) -> str:
    """
    A trace as it continues a prompt: if the prompt ends in an opening think tag, the same tag is taken off the trace.
    """
    if prompt.rstrip().endswith(_THINK) and trace.lstrip().startswith(_THINK):
        return trace.lstrip().removeprefix(_THINK).lstrip()
    return trace


def _filled(prompt: Any, template: Template) -> Any:
    if isinstance(prompt, str):
        return template.text.replace(_SLOT, prompt)
    turns = [position for position, message in enumerate(prompt) if message["role"] == "user"]
    if not turns or not isinstance(prompt[turns[-1]]["content"], str):
        raise ValueError("`prompt_template` needs a user message whose content is a string in every conversation")
    text = template.text.replace(_SLOT, prompt[turns[-1]]["content"])
    if not template.plain:
        return [{**m, "content": text} if i == turns[-1] else m for i, m in enumerate(prompt)]
    if len(prompt) > 1:
        raise ValueError(
            f"`prompt_template` makes plain text of conversations of one user message, not of {len(prompt)} messages"
        )
    return text


def _plain_answer(answer: Any) -> Any:
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return answer[-1]["content"]
    return [_plain_answer(each) for each in answer] if isinstance(answer, list) else answer


def _without_open_think(answer: Any, prompt: str) -> Any:
    if isinstance(answer, str):
        return without_open_think(answer, prompt)
    if isinstance(answer, list) and all(isinstance(each, str) for each in answer):
        return [without_open_think(each, prompt) for each in answer]
    return answer
