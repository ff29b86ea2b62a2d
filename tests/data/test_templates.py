import pytest
from datasets import Dataset

from trl_bridge.data.templates import TEMPLATES, find_template, with_prompt_template, without_open_think
from trl_bridge.evaluation.benchmarks import BENCHMARKS


USER, ANSWER = {"role": "user", "content": r"Is $\frac{1}{2} = {prompt}$?"}, {"role": "assistant", "content": "Yes."}
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def put(template, **row):
    (result,) = with_prompt_template(Dataset.from_list([row]), template).to_list()
    return result


def test_a_conversation_keeps_its_form_and_its_braces():
    system = {"role": "system", "content": "S"}
    row = put("boxed", prompt=[system, USER], completion=[ANSWER], solution="Yes")
    assert row == {
        "prompt": [system, {"role": "user", "content": f"{USER['content']}\n{BOXED}"}],
        "completion": [ANSWER],
        "solution": "Yes",
    }
    assert put("boxed", prompt="1+1=") == {"prompt": f"1+1=\n{BOXED}"}
    # Only the last user message of a longer conversation, and never the answer.
    turns = [USER, ANSWER, {"role": "user", "content": "And 2?"}, ANSWER]
    assert put("Q: {prompt}", messages=turns)["messages"] == [
        *turns[:2],
        {"role": "user", "content": "Q: And 2?"},
        ANSWER,
    ]


def test_plain_templates_make_strings():
    row = put("abel", prompt=[USER], completion=[ANSWER], expert=["a", "b"])
    assert row["prompt"] == f"Question:\n{USER['content']}\nAnswer:\nLet's think step by step."
    assert row["completion"] == "Yes." and row["expert"] == ["a", "b"]
    own = put("plain:Q: {prompt}\nA:", prompt=[USER], expert=[[ANSWER], [ANSWER]])
    assert own == {"prompt": f"Q: {USER['content']}\nA:", "expert": ["Yes.", "Yes."]}


def test_qwen_boxed_is_what_qwens_chat_template_makes_of_boxed():
    boxed = put("boxed", prompt="1+1=")["prompt"]
    chat = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{boxed}<|im_end|>\n"
    assert put("qwen-boxed", prompt="1+1=")["prompt"] == f"{chat}<|im_start|>assistant\n"


@pytest.mark.parametrize(("name", "benchmark"), [("boxed", "math500"), ("knights-knaves", "knights-knaves")])
def test_training_and_evaluation_ask_alike(name, benchmark):
    assert find_template(BENCHMARKS[benchmark].template) == TEMPLATES[name]


def test_a_think_tag_that_the_prompt_opens_is_not_opened_twice():
    trace = "<think>\nHm.\n</think>\n2"
    row = put("plain:{prompt} <think>\n", prompt="1+1=", completion=trace, expert=[trace, "2"])
    assert row["prompt"] + row["completion"] == "1+1= <think>\nHm.\n</think>\n2"
    assert row["expert"] == ["Hm.\n</think>\n2", "2"]
    # Nothing is taken off where the prompt opens nothing, or closes what it opened.
    for prompt in ("1+1=", "<think>\n</think>\n"):
        assert without_open_think(trace, prompt) == trace
    assert put("{prompt}", prompt="1+1=", completion=trace)["completion"] == trace


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        ("boxd", {"prompt": "x"}, "did you mean `boxed`"),
        ("Think hard.", {"prompt": "x"}, "has no {prompt}"),
        ("boxed", {"text": "x"}, "needs a `prompt` or `messages` column"),
        ("abel", {"messages": [USER, ANSWER]}, "needs a `prompt` column"),
        ("abel", {"prompt": [{"role": "system", "content": "S"}, USER]}, "not of 2 messages"),
        ("boxed", {"prompt": [ANSWER]}, "needs a user message"),
    ],
)
def test_refusals(template, row, said):
    with pytest.raises(ValueError) as refused:
        put(template, **row)
    assert said in str(refused.value)


def test_a_name_goes_before_a_text():
    assert find_template("boxed") is TEMPLATES["boxed"]
