import logging
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset

from trl_bridge.demonstrations.group import Experts
from trl_bridge.models import tiny_tokenizer


PLAIN = tiny_tokenizer()


def experts(rows, tokenizer=PLAIN, **changes):
    options = {"eos_token_id": [tokenizer.eos_token_id], "max_length": 8, "overlong": "error", "seed": 5}
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return Experts(dataset, tokenizer, **{**options, **changes})


def text(ids, tokenizer=PLAIN):
    return tokenizer.decode(ids)


def test_a_trace_ends_in_one_eos():
    drawn = experts([{"prompt": "1+1=", "expert": "2"}, {"prompt": "2+1=", "expert": "3<eos>"}])
    assert text(drawn.draw("1+1=", 0, 0)) == "2<eos>"
    assert text(drawn.draw("2+1=", 0, 0)) == "3<eos>"


def test_prompts_without_trace():
    drawn = experts([{"prompt": "a", "expert": None}, {"prompt": "b", "expert": ""}, {"prompt": "c", "expert": "d"}])
    assert drawn.draw("a", 0, 0) is drawn.draw("b", 0, 0) is None
    assert drawn.draw("not in the data", 0, 0) is None
    assert text(drawn.draw("c", 0, 0)) == "d<eos>"


def test_one_of_several_traces_by_generation_and_group_alone():
    rows = [{"prompt": "a", "expert": ["x", "", "y"]}, {"prompt": "a", "expert": ["z"]}, {"prompt": "b", "expert": []}]
    first, again, other = experts(rows), experts(rows), experts(rows, seed=6)
    places = [(generation, group) for generation in range(20) for group in range(15)]
    drawn = [text(first.draw("a", *place)) for place in places]
    counts = Counter(drawn)
    assert set(counts) == {"x<eos>", "y<eos>", "z<eos>"}
    # 300 draws at 1/3: standard deviation 8.2; five of them.
    assert all(abs(count - 100) < 41 for count in counts.values())
    assert [text(again.draw("a", *place)) for place in reversed(places)] == drawn[::-1]
    assert [text(other.draw("a", *place)) for place in places] != drawn
    assert first.draw("b", 0, 0) is None


def test_probability_of_use():
    drawn = experts([{"prompt": "a", "expert": "x"}])
    places = [(generation, group) for generation in range(20) for group in range(20)]
    used = [drawn.draw("a", *place, 0.25) is not None for place in places]
    # 400 draws at 1/4: standard deviation 8.7; five of them.
    assert abs(sum(used) - 100) < 44
    more = [drawn.draw("a", *place, 0.5) is not None for place in places]
    assert all(second for first, second in zip(used, more, strict=True) if first)
    assert not any(drawn.draw("a", *place, 0.0) for place in places)


def test_uniform_is_a_groups_own_and_touches_nothing_global():
    drawn = experts([{"prompt": "a", "expert": "x"}])
    before = torch.get_rng_state()
    values = [
        drawn.uniform(generation, group, purpose) for generation in (0, 1) for group in (0, 1) for purpose in (2, 3)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(values)) == 8 and all(0.0 <= value < 1.0 for value in values)
    again = experts([{"prompt": "a", "expert": "x"}])
    assert again.uniform(1, 0, 3) == values[5]


def test_conversations_with_text_or_messages():
    tokenizer = tiny_tokenizer(chat_template=True)
    prompts = [[{"role": "user", "content": name}] for name in "abc"]
    answer = [{"role": "assistant", "content": "hi"}]
    as_text = experts([{"prompt": prompt, "expert": "hi"} for prompt in prompts], tokenizer)
    as_messages = experts([{"prompt": prompt, "expert": answer} for prompt in prompts], tokenizer)
    as_lists = experts([{"prompt": prompt, "expert": [answer, answer]} for prompt in prompts], tokenizer)
    for drawn in (as_text, as_messages, as_lists):
        for prompt in prompts:
            assert text(drawn.draw(prompt, 0, 0), tokenizer) == "hi<|im_end|>"
    # A prompt with the columns' order and empty fields of another dataset is the same one.
    assert as_text.draw([{"content": "a", "role": "user", "name": None}], 0, 0) is not None


LONG = [
    {"prompt": "a", "expert": "1234567"},
    {"prompt": "b", "expert": "12345678"},
    {"prompt": "c", "expert": "1" * 20},
]


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_bridge"), "propagate", True)
    caplog.set_level("WARNING")
    return caplog


def test_overlong_is_left_out(heard):
    drawn = experts(LONG, overlong="skip")
    assert text(drawn.draw("a", 0, 0)) == "1234567<eos>"
    assert drawn.draw("b", 0, 0) is drawn.draw("c", 0, 0) is None
    assert (
        "2 of 3 traces" in heard.text and "train without expert" in heard.text and "row 1 with 9 tokens" in heard.text
    )


def test_overlong_is_cut(heard):
    drawn = experts(LONG, overlong="truncate")
    assert [text(drawn.draw(prompt, 0, 0)) for prompt in "abc"] == ["1234567<eos>", "12345678", "1" * 8]
    assert "2 of 3 traces" in heard.text and "do not end" in heard.text


def test_overlong_is_refused():
    with pytest.raises(ValueError, match="2 of 3 traces.*row 1 with 9 tokens.*`expert_max_length`.*'skip'"):
        experts(LONG, overlong="error")
    with pytest.raises(ValueError, match="Every trace in the `expert` column .* longer than 8 tokens"):
        experts(LONG[1:], overlong="skip")


def test_a_fitting_trace_beside_an_overlong_one_is_used():
    drawn = experts([{"prompt": "a", "expert": ["1" * 20, "23"]}], overlong="skip")
    assert {text(drawn.draw("a", 0, group)) for group in range(20)} == {"23<eos>"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "no `expert` column .*'completion', 'prompt'"),
        (
            [{"prompt": "a", "expert": None}, {"prompt": "b", "expert": ""}],
            "No row of `train_dataset` has an `expert`",
        ),
        (
            [{"prompt": "a", "expert": []}, {"prompt": "b", "expert": [{"role": "assistant", "content": "c"}]}],
            "row 1: `prompt` is a string, so `expert` must be one too",
        ),
    ],
)
def test_bad_columns(rows, message):
    with pytest.raises(ValueError, match=message):
        experts(rows)


def test_the_row_of_the_users_dataset_is_named():
    rows = [{"prompt": "a", "expert": ["b", "c"]}, {"prompt": "d", "expert": []}, {"prompt": "e", "expert": ["<eos>"]}]
    with pytest.raises(ValueError, match="`train_dataset` row 2 has no completion tokens"):
        experts(rows)


def test_datasets_that_cannot_be_looked_through():
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a", "expert": "b"}]))
    with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset`.*`IterableDataset`"):
        Experts(stream, PLAIN, eos_token_id=[1], max_length=8, overlong="skip", seed=0)


def test_fingerprint_is_of_the_traces():
    rows = [{"prompt": "a", "expert": "x"}, {"prompt": "b", "expert": None}]
    base = experts(rows).fingerprint
    assert experts([{**row, "answer": 1} for row in rows]).fingerprint == base
    assert experts([{"prompt": "a", "expert": "y"}, rows[1]]).fingerprint != base
    assert experts([*rows, {"prompt": "c", "expert": "x"}]).fingerprint != base
