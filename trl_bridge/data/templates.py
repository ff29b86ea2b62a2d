"""What is put around a question: prompt templates by name, or as a string with `{prompt}`."""

import difflib
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from ..demonstrations.rows import prompt_fault
from .files import code_of


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
    if _SLOT not in template:
        template = template.replace("{question}", _SLOT)
    if _SLOT in template:
        return Template(template.removeprefix(_PLAIN), plain=template.startswith(_PLAIN))
    nearest = difflib.get_close_matches(template, TEMPLATES, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are: {', '.join(TEMPLATES)}"
    raise ValueError(f"`prompt_template`: no template is called {template!r} ({hint}), and it has no {_SLOT}")


@dataclass(frozen=True)
class Prompting:
    """
    How questions become prompts.

    Attributes:
        system_prompt (`str`, *optional*):
            System message. `None` sends none.
        template (`str`, *optional*):
            Prompt template: a name or a text with `{prompt}` (or `{question}`), as in training; see
            [`~trl_bridge.data.templates.find_template`]. `None` is the benchmark's own, and for other datasets the prompt as
            it stands.
        chat_template (`bool`, *optional*, defaults to `True`):
            Whether the questions of the benchmarks go through the tokenizer's chat template, unless the prompt template is
            a plain one. Prompts of other datasets are what the dataset says, as in training.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the tokenizer's chat template, as in [`~trl.GRPOConfig`].
        day (`str`, *optional*):
            The day that a chat template prints, as 2026-11-30. `None` is the clock's.

    Raises:
        ValueError: no such template, or a system prompt where there are no conversations.
    """

    system_prompt: str | None = None
    template: str | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    day: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and find_template(self.template).plain and self.system_prompt is not None:
            raise ValueError(
                f"`system_prompt` needs conversations, and `prompt_template: {self.template}` makes plain text: write the "
                "system prompt into the template"
            )
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError("`system_prompt` needs conversations: leave `chat_template` on")

    def found(self, default: str) -> Template:
        """The template, in place of a default one."""
        return find_template(self.template or default)


def with_prompting(dataset: Dataset | IterableDataset, prompting: Prompting) -> Dataset | IterableDataset:
    """Put the template around every question, then the system message in front of every conversation."""
    if prompting.template is not None:
        dataset = with_prompt_template(dataset, prompting.template)
    return dataset if prompting.system_prompt is None else with_system_prompt(dataset, prompting.system_prompt)


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

    def convert(row: dict[str, Any], index: int, code: str) -> dict[str, Any]:
        prompt = _filled(row[prompts], found, index)
        answers = {column: row[column] for column in changed if column != prompts}
        if found.plain:
            answers = {column: _plain_answer(value) for column, value in answers.items()}
        if isinstance(prompt, str):
            answers = {column: _without_open_think(value, prompt) for column, value in answers.items()}
        return {prompts: prompt, **answers}

    return dataset.map(convert, with_indices=True, fn_kwargs=code_of(sys.modules[__name__]), remove_columns=changed)


def with_system_prompt(dataset: Dataset | IterableDataset, system_prompt: str) -> Dataset | IterableDataset:
    """
    Put a system message in front of every conversation; prompts and completions that are strings become messages.
    """
    present = list(dataset.column_names or [])
    system = {"role": "system", "content": system_prompt}

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for column, role in (("prompt", "user"), ("completion", "assistant"), ("messages", "user")):
            if column not in present:
                continue
            value = row[column]
            if not value:  # null or without messages, which training refuses and a check finds
                converted[column] = None
                continue
            messages = [{"role": role, "content": value}] if isinstance(value, str) else list(value)
            if column != "completion" and messages[0]["role"] != "system":
                messages = [system, *messages]
            converted[column] = messages
        return converted

    # Columns that change their type are dropped first: datasets would cast the messages back to strings.
    changed = [column for column in ("prompt", "completion", "messages") if column in present]
    return dataset.map(convert, remove_columns=changed)


def without_open_think(trace: str, prompt: str) -> str:
    """
    A trace as it continues a prompt: if the prompt ends in an opening think tag, the same tag is taken off the trace.
    """
    if prompt.rstrip().endswith(_THINK) and trace.lstrip().startswith(_THINK):
        return trace.lstrip().removeprefix(_THINK).lstrip()
    return trace


def _filled(prompt: Any, template: Template, row: int) -> Any:
    if prompt_fault(prompt) is not None:
        return None  # training refuses the row, and a check finds it
    if isinstance(prompt, str):
        return template.text.replace(_SLOT, prompt)
    turns = [position for position, message in enumerate(prompt) if message["role"] == "user"]
    if not turns or not isinstance(prompt[turns[-1]]["content"], str):
        raise ValueError(f"row {row}: `prompt_template` needs a user message whose content is a string")
    text = template.text.replace(_SLOT, prompt[turns[-1]]["content"])
    if not template.plain:
        return [{**m, "content": text} if i == turns[-1] else m for i, m in enumerate(prompt)]
    if len(prompt) > 1:
        raise ValueError(
            f"row {row}: `prompt_template` makes plain text of conversations of one user message, not of {len(prompt)} "
            "messages"
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
