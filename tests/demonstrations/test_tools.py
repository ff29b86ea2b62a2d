"""Demonstrations with tools: which tokens they have, which of them are trained, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers.utils import get_json_schema
from trl.chat_template_utils import qwen3_training_chat_template

from tests.helpers.tools import SCHEMA, TOKENIZER, add, assistant, call, told, user
from trl_bridge.demonstrations.group import Experts
from trl_bridge.demonstrations.render import render_demonstrations
from trl_bridge.models import tiny_tokenizer


ROW = {"messages": [user("1+2="), call(1, 2), told("sum 3"), call(3, 4), told("a"), told("b"), assistant("7")]}
TURNS = [
    '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>',
    '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call><|im_end|>',
    "7<|im_end|>",
]


def render(rows, tokenizer=TOKENIZER, **kwargs):
    kwargs = {"tools": {None: [SCHEMA]}, "eos_token_id": tokenizer.eos_token_id, **kwargs}
    return render_demonstrations(Dataset.from_list(rows), tokenizer, **kwargs)


def pieces(example, tokenizer=TOKENIZER):
    """The runs of trained tokens, and those between them."""
    trained, rest, before = [], [], None
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
        place, own = (trained, True) if label != -100 else (rest, False)
        if own != before:
            place.append([])
        place[-1].append(token)
        before = own
    return [[tokenizer.decode(ids) for ids in runs] for runs in (trained, rest)]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": ROW["messages"][:1], "completion": ROW["messages"][1:]},
        # Arguments as JSON, and what comes after the last turn.
        {"messages": [*ROW["messages"], user("thanks")]},
    ],
    ids=["messages", "prompt-completion", "trailing"],
)
def test_the_assistants_turns_alone_are_trained(row):
    example = render([row])[0]
    trained, rest = pieces(example)
    assert trained == TURNS
    text = TOKENIZER.apply_chat_template(ROW["messages"][:1], tools=[add], add_generation_prompt=True, tokenize=False)
    assert rest[0] == text and "add(a, b)" in text
    assert rest[1] == "\n<|im_start|>tool\nsum 3<|im_end|>\n<|im_start|>assistant\n"
    assert rest[2] == ("\n<|im_start|>tool\na<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads(example["prompt_key"]) == [user("1+2=")]


def test_a_template_whose_results_are_user_turns():
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.chat_template = qwen3_training_chat_template
    trained, rest = pieces(render([ROW], tokenizer)[0], tokenizer)
    assert len(trained) == 3 and all(turn.endswith("<|im_end|>") for turn in trained)
    assert trained[2] == "<think>\n\n</think>\n\n7<|im_end|>"
    assert rest[2].count("<tool_response>") == 2 and rest[1] == (
        "\n<|im_start|>user\n<tool_response>\nsum 3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokens_are_a_rollouts():
    """As TRL joins them: the prompt, the turn up to its end, the results in their place, the next turn."""
    from trl import GRPOTrainer

    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.processing_class = trainer._tokenizer = TOKENIZER
    trainer.chat_template, trainer.chat_template_kwargs, trainer._is_vlm = None, {}, False
    ids = TOKENIZER.apply_chat_template(ROW["messages"][:1], tools=[add], add_generation_prompt=True)["input_ids"]
    for turn, results in zip(TURNS, ([told("sum 3")], [told("a"), told("b")], []), strict=True):
        ids = ids + TOKENIZER(turn)["input_ids"] + (trainer._get_tool_suffix_ids(results) if results else [])
    assert render([ROW])[0]["input_ids"] == ids


def test_arguments_are_those_of_the_call():
    """Not the `None`s of other rows' arguments, and the same where they are written as JSON."""

    def look(word: str):
        """
        Looks.

        Args:
            word: A word.
        """

    other = {
        **assistant(""),
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"word": "x"}}}],
    }
    rows = [ROW, {"messages": [user("x"), other, told("y", "look"), assistant("z")]}]
    dataset = Dataset.from_list(rows)
    assert dataset[1]["messages"][1]["tool_calls"][0]["function"]["arguments"].keys() == {"a", "b", "word"}
    tools = {None: [SCHEMA, get_json_schema(look)]}
    assert pieces(render(rows, tools=tools)[1])[0][0] == (
        '<tool_call>{"name": "look", "arguments": {"word": "x"}}</tool_call><|im_end|>'
    )
    written = json.loads(json.dumps(ROW))
    for message in written["messages"]:
        for each in message.get("tool_calls", []):
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    assert render([written])[0] == render([ROW])[0]


def test_the_rows_own_tools_come_first():
    row = {**ROW, "tools": json.dumps([{**SCHEMA, "function": {**SCHEMA["function"], "name": "add"}}])}
    assert render([row], tools=None)[0]["input_ids"] == render([ROW])[0]["input_ids"]


def test_rows_without_calls_see_the_tools_too():
    example = render([{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}])[0]
    trained, rest = pieces(example)
    assert trained == ["d<|im_end|>"] and "add(a, b)" in rest[0]


BAD = {
    "no schemas": (ROW, {"tools": None}, r"`sft_dataset` row 1: `messages` uses tools.*`tools`"),
    "no schemas, in the prompt": (
        {"prompt": ROW["messages"][:3], "completion": [assistant("3")]},
        {"tools": {None: []}},
        r"row 1: `completion` uses tools",
    ),
    "results alone": ({"messages": [user("a"), told("b"), assistant("c")]}, {"tools": None}, "row 1: `messages` uses tools"),
    "another tool": (
        {"messages": [user("a"), call(1, 2, "sub"), told("b"), assistant("c")]}, {}, r"row 1: `messages` calls 'sub'.*\(add\)",
    ),
    "no JSON": (
        {"messages": [user("a"), {**assistant(""), "tool_calls": [{"function": {"name": "add", "arguments": "{a"}}]}]},
        {},
        "row 1: the arguments of a call of 'add' are no JSON",
    ),
    "no object": (
        {"messages": [user("a"), {**assistant(""), "tool_calls": [{"function": {"name": "add", "arguments": "[1, 2]"}}]}]},
        {},
        r"row 1: the arguments of a call of 'add' are no JSON object: \[1, 2\]",
    ),
    "no turn": ({"prompt": [user("a")], "completion": [user("b")]}, {}, "row 1 has no completion tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_row(name):
    row, changes, message = BAD[name]
    if "messages" in row:
        good = {"messages": [user("a"), assistant("b")]}
    else:
        good = {"prompt": [user("a")], "completion": [assistant("b")]}
    with pytest.raises(ValueError, match=message):
        render([good, row], **changes)


def test_a_template_that_drops_calls_or_results_is_refused():
    plain = tiny_tokenizer(chat_template=True)
    with pytest.raises(
        ValueError, match="row 0: the chat template drops the completion's tool calls or their results"
    ):
        render([ROW], plain)


def templated(template):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def of_trl(name):
    return templated((Path(trl.__path__[0]) / "chat_templates" / f"{name}.jinja").read_text())


@pytest.mark.parametrize("name", ["lfm2", "lfm2_training"])
def test_a_template_that_has_schemas_and_no_calls_is_refused(name):
    with pytest.raises(ValueError, match="row 0: the chat template drops the completion's tool calls"):
        render([{"messages": [user("1+2="), call(1, 2), told("sum 3"), assistant("3")]}], of_trl(name))


def test_an_answer_that_repeats_the_result_does_not_stand_for_it():
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    rows = [{"messages": [user("1+2="), call(1, 2), told("3"), assistant("It is 3.")]}]
    with pytest.raises(
        ValueError, match="row 0: the chat template drops the completion's tool calls or their results"
    ):
        render(rows, templated(template))
    shown = template.replace("m.role != 'tool'", "true")
    assert pieces(render(rows, templated(shown))[0], TOKENIZER)[0][-1] == "It is 3.<|im_end|>"


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "gptoss_training"])
def test_results_and_calls_may_be_written_as_json(name):
    said = 'sum\nof "two" 3'
    example = render([{"messages": [user("1+2="), call(1, 2), told(said), assistant("3")]}], of_trl(name))[0]
    assert any(r"sum\nof" in text for text in pieces(example)[1])


def experts(rows, **changes):
    options = {"eos_token_id": [TOKENIZER.eos_token_id], "max_length": 400, "overlong": "skip", "seed": 0}
    return Experts(Dataset.from_list(rows), TOKENIZER, **{**options, "tools": {None: [SCHEMA]}, **changes})


def test_traces_of_several_turns():
    rows = [
        {"prompt": [user("1+2=")], "expert": ROW["messages"][1:]},
        {"prompt": [user("a")], "expert": [assistant("b")]},
    ]
    found = experts(rows)
    trace = found.draw([user("1+2=")], 0, 0)
    own = found.own(trace)
    assert TOKENIZER.decode([token for token, mine in zip(trace, own, strict=True) if mine]) == "".join(TURNS)
    assert TOKENIZER.decode([token for token, mine in zip(trace, own, strict=True) if not mine]).count("tool") == 3
    assert [message["role"] for message in found.messages(trace)] == [
        "assistant",
        "tool",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    plain = found.draw([user("a")], 0, 0)
    assert all(found.own(plain)) and found.messages(plain) is None and found.first_row_of_turns == 0
    with pytest.raises(ValueError, match="`train_dataset` row 0: `expert` uses tools"):
        experts(rows, tools=None)
    with pytest.raises(ValueError, match="`train_dataset` row 0: the trace in `expert` has .* cannot be cut"):
        experts(rows, max_length=20, overlong="truncate")
