import json

import pytest
from datasets import Dataset

from trl_bridge.data import checks
from trl_bridge.data.checks import check_dataset, rendered_samples
from trl_bridge.data.overlap import find_overlaps, question_text
from trl_bridge.data.rows import load_named_dataset
from trl_bridge.data.templates import Prompting, with_prompting
from trl_bridge.demonstrations.render import render_demonstrations
from trl_bridge.models import end_tokens, load_tokenizer, tiny_model, tiny_tokenizer


CHAT = tiny_tokenizer(chat_template=True)
LONG = "a train leaves the town at nine and another one follows it an hour later how soon do they meet"
WORDS = LONG.split()


def spoken(question, answer, solution="2", **columns):
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}],
        "solution": solution,
        **columns,
    }


def found(findings):
    return {finding.row: finding.what for finding in findings}


def test_a_sound_dataset():
    rows = Dataset.from_list([spoken("1+1=", "2"), spoken("1+2=", "3", "3")])
    length = len("user\n1+1=\nassistant\n2") + 4
    report = check_dataset(rows, tokenizer=CHAT, max_length=length, benchmarks={"b": ["9+9="]})
    assert report.sound and report.rows == 2
    assert report.lengths == [length] * 2


def test_everything_that_is_wrong_is_found_in_its_row():
    rows = Dataset.from_list(
        [
            spoken("1+1=", "2"),
            spoken("1+1=", "2"),  # a duplicate
            spoken("1+1=", "1+1 is 2"),  # another demonstration of it: none
            spoken("  ", "3", "3"),  # empty prompt
            spoken("1+4=", "", "5"),  # empty completion: does not render either
            spoken("1+5=", "6", None),  # no gold
            spoken("1+6=", "7", r"\frac{1}{"),  # a broken one
            spoken("1+7=", "8" * 50, "8"),  # too long
            spoken("1+8=", "9", "9"),  # in the benchmark
        ]
    )
    report = check_dataset(rows, tokenizer=CHAT, max_length=60, benchmarks={"b": ["1+3=", "1 + 9", "1+8="]})
    assert found(report.duplicates) == {1: "the same as row 0"}
    assert found(report.empty) == {3: "`prompt` is empty", 4: "`completion` is empty", 5: "`solution` is empty"}
    assert set(found(report.golds)) == {5, 6} and "does not parse" in found(report.golds)[6]
    assert set(found(report.unrenderable)) == {4} and "no completion tokens" in found(report.unrenderable)[4]
    assert found(report.overlong) == {7: f"{len('user1+7=assistant') + 3 + 4 + 50} tokens"}
    assert [(overlap.row, overlap.benchmark, overlap.benchmark_row) for overlap in report.overlaps] == [(8, "b", 2)]
    assert report.bad_rows == {1, 3, 4, 5, 6, 7, 8} and not report.sound
    assert len(report.lengths) == 8


def test_golds_are_checked_as_what_they_are():
    rows = Dataset.from_list([spoken("Who?", "A", "(1) Ada is a knight"), spoken("And now?", "B", "nobody knows")])
    assert set(found(check_dataset(rows, golds="roles").golds)) == {1}
    assert check_dataset(rows, golds="none").golds == []
    gym = Dataset.from_list([spoken("Sum?", "A", "{{", metadata="{}")])
    assert check_dataset(gym).golds == []
    with pytest.raises(ValueError, match="`golds` must be one of math, roles, none"):
        check_dataset(rows, golds="maths")
    with pytest.raises(ValueError, match="`max_length` counts tokens"):
        check_dataset(rows, max_length=3)
    with pytest.raises(ValueError, match="has no rows"):
        check_dataset(rows.select([]))


# Overlap


def test_thirteen_words_are_an_overlap_and_twelve_are_not():
    shared = " ".join(WORDS[3:16])
    assert len(shared.split()) == 13
    ((row, benchmark, benchmark_row, words),) = find_overlaps([f"Now: {shared}?"], {"b": ["other", LONG.upper()]})
    assert (row, benchmark, benchmark_row, words) == (0, "b", 1, shared)
    twelve = " ".join(WORDS[3:15])
    assert find_overlaps([f"Now: {twelve}, but not so"], {"b": [LONG]}) == []
    assert len(find_overlaps([f"Now: {twelve}, but not so"], {"b": [LONG]}, ngram=12)) == 1


def test_overlap_does_not_see_punctuation_of_runs_but_all_of_short_questions():
    assert find_overlaps([LONG.replace(" ", ", ")], {"b": [LONG]})
    assert find_overlaps(["What is 2+3?"], {"b": ["What is 2-3?"]}) == []
    assert find_overlaps(["what  is 2+3?"], {"b": ["What is 2+3?"]})
    # A short question inside a longer one is none: "what is 2" would be everywhere.
    assert find_overlaps(["What is 2+3?"], {"b": ["What is 2+3? Explain."]}) == []


def test_each_benchmark_counts_once_for_a_row():
    hits = find_overlaps([LONG, "x", LONG], {"a": [LONG, LONG], "b": [LONG]})
    assert [(hit.row, hit.benchmark, hit.benchmark_row) for hit in hits] == [
        (0, "a", 0),
        (0, "b", 0),
        (2, "a", 0),
        (2, "b", 0),
    ]
    with pytest.raises(ValueError, match="`ngram` must be at least 1"):
        find_overlaps(["x"], {}, ngram=0)


def test_question_text():
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    assert question_text({"messages": turns}) == "Q" == question_text({"problem": "Q", "solution": "x"})
    with pytest.raises(ValueError, match="no question under any of the names"):
        question_text({"solution": "x"})


# Samples


def test_samples_are_the_trainers_tokens():
    rows = Dataset.from_list([spoken("1+1=", "2"), spoken("1+2=", "3", "3")])
    (sample,) = rendered_samples(rows, CHAT, [1])
    assert sample.row == 1 and sample.solution == "3"
    assert "".join(sample.prompt) == "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
    assert sample.completion == ["3", "<|im_end|>"]
    prompts = rows.remove_columns("completion")
    assert rendered_samples(prompts, CHAT, [1])[0].prompt == sample.prompt
    assert rendered_samples(prompts, CHAT, [1])[0].completion == []
    plain = Dataset.from_list([{"prompt": "1+1="}])
    assert rendered_samples(plain, CHAT, [0])[0].prompt == list("1+1=")


def test_prompts_that_cannot_be_asked_are_found(tmp_path):
    user = [{"role": "user", "content": "1+1="}]
    path = tmp_path / "rows.jsonl"
    prompts = [user, None, [{"role": "user", "content": None}], [], "1+1=", [{"content": "2"}]]
    path.write_text("".join(json.dumps({"prompt": prompt, "solution": "2"}) + "\n" for prompt in prompts))
    rows = load_named_dataset(str(path))["train"]
    findings = found(check_dataset(rows, tokenizer=CHAT).empty)
    assert set(findings) == {1, 2, 3, 4, 5} and "that of the first row messages" in findings[4]
    for prompting in (Prompting(system_prompt="S"), Prompting(template="boxed")):
        templated = with_prompting(rows.select([0, 1, 2, 3]), prompting)
        assert templated[0]["prompt"] and check_dataset(templated, tokenizer=CHAT).bad_rows == {1, 2, 3}
    with pytest.raises(ValueError, match="no column `prompt`; name it with `prompt_column`. It has: question"):
        check_dataset(Dataset.from_dict({"question": ["1+1="]}), tokenizer=CHAT)


def test_a_model_with_several_end_tokens_shows_the_tokens_of_training(tmp_path):
    """As Llama 3 and Gemma: a turn ends in another token than the tokenizer's end of a text."""
    tokenizer = tiny_tokenizer(chat_template=True)
    ids = {"eos": tokenizer.convert_tokens_to_ids("<unk>"), "turn": tokenizer.eos_token_id}
    tokenizer.eos_token = "<unk>"
    model = tiny_model(tokenizer)
    model.generation_config.eos_token_id = [ids["eos"], ids["turn"]]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    ends = end_tokens(str(tmp_path), load_tokenizer(str(tmp_path)))
    assert ends == [ids["eos"], ids["turn"]]
    rows = Dataset.from_list([spoken("1+1=", "2")])
    (sample,) = rendered_samples(rows, tokenizer, [0], eos_token_ids=ends)
    trained = render_demonstrations(rows, tokenizer, eos_token_id=ends)[0]["labels"]
    assert sample.completion == ["2", "<|im_end|>"] == [tokenizer.decode(t) for t in trained if t != -100]
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(str(tmp_path), tokenizer) == [ids["eos"]]


def test_many_rows_are_rendered_by_several_processes(monkeypatch):
    rows = Dataset.from_list([spoken(f"1+{number}=", "2") for number in range(9)] + [spoken("a", "")])
    alone = check_dataset(rows, tokenizer=CHAT, golds="none")
    monkeypatch.setattr(checks, "_processes", lambda rows: 2)
    several = check_dataset(rows, tokenizer=CHAT, golds="none")
    assert several == alone and several.lengths and found(several.unrenderable).keys() == {9}


def test_rows_go_to_the_tokenizer_together(monkeypatch):
    calls = []
    encode = type(CHAT).__call__
    monkeypatch.setattr(type(CHAT), "__call__", lambda self, *a, **k: calls.append(k["text"]) or encode(self, *a, **k))
    rows = Dataset.from_list([spoken(f"1+{number}=", "" if number in (0, 4, 8) else "2") for number in range(9)])
    report = check_dataset(rows, tokenizer=CHAT, golds="none")
    assert [len(texts) for texts in calls] == [2 * 6] and len(report.lengths) == 6
    assert found(report.unrenderable) == dict.fromkeys(
        (0, 4, 8), "has no completion tokens: there is nothing to learn from it. Remove the row."
    )
    with pytest.raises(ValueError, match="`sft_dataset` row 4 has no completion tokens"):
        render_demonstrations(rows.select([1, 2, 3, 5, 4, 8]).select([0, 1, 2, 3, 4, 5]), CHAT, eos_token_id=1)


@pytest.mark.parametrize(
    ("shared", "around"),
    [
        ("一列火车早上九点从甲城出发开往乙城", "问题：{}，请问？"),
        ("ある列車は午前九時に町を出発します", "問題。{}か。"),
        ("รถไฟขบวนหนึ่งออกจากเมืองตอนเก้าโมงเช้าวันนี้", "โจทย์{}เท่าไร"),
        ("ａ列火车早上９点从甲城出发开往", "甲：{}。"),
        ("一列火车早上9点从 A city 出发开往远方的乙城", "甲：{}。"),
    ],
)
def test_overlap_where_no_blanks_stand_between_words(shared, around):
    (overlap,) = find_overlaps([around.format(shared)], {"b": ["1+1=", f"另外的开头{shared}结尾"]})
    assert (overlap.row, overlap.benchmark_row) == (0, 1)
    cut = shared[: len(shared) // 3]
    assert find_overlaps([around.format(cut) + "甲乙丙丁"], {"b": [f"另外的开头{shared}结尾"]}) == []


def test_overlap_counts_characters_of_such_scripts():
    text = "一二三四五六七八九十百千万"
    assert find_overlaps([f"甲{text}"], {"b": [f"{text}乙"]}) and not find_overlaps(
        [f"甲{text[1:]}"], {"b": [f"{text}乙"]}
    )
    assert find_overlaps(["x² y 1 2 3 4 5 6 7 8 9 10 11"], {"b": ["z x² y 1 2 3 4 5 6 7 8 9 10 11"]})
