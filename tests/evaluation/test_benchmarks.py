import base64
import json
import pickle
import re
import zlib

import pytest
from datasets import Dataset

from tests.helpers.evaluation import FIXTURES
from trl_bridge.data.templates import find_template
from trl_bridge.evaluation import BENCHMARKS, Prompting, load_task, tasks
from trl_bridge.evaluation.benchmarks import _private_tests
from trl_bridge.evaluation.tasks import parse_benchmarks


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def fixture_task(name, **options):
    return load_task(name, name, str(FIXTURES / f"{name}.jsonl"), **options)


def user(row):
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_pinned_and_renders_its_raw_schema(name):
    benchmark = BENCHMARKS[name]
    assert re.fullmatch(r"[0-9a-f]{40}", benchmark.revision)
    assert "{prompt}" in find_template(benchmark.template).text
    task = fixture_task(name)
    assert len(task.rows) == 3
    assert task.grader.__name__ == benchmark.grader.rpartition(".")[2]
    raw = [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, source in zip(task.rows, raw, strict=True):
        assert set(row) == {"prompt", "tests" if name == "livecodebench" else "solution"}
        assert str(source[benchmark.columns[0]]).strip() in user(row)
        assert "{prompt}" not in user(row)


@pytest.mark.parametrize(
    ("name", "prompts", "golds"),
    [
        ("math500", ["Compute $\\frac{1}{3}+\\frac{5}{12}$." + BOXED], ["\\frac{3}{4}", "-3,3"]),
        ("minerva", ["A source emits 4.5e33 erg/s. State its power in erg/s." + BOXED], ["4.5e33", "3 e^{-2 t}"]),
        ("olympiadbench", ["Find the number of ways to order 4 books." + BOXED], ["24", "2,3", "$\\frac{3}{2}$"]),
        ("aime24", ["How many positive integers are at most 204?" + BOXED], ["204", "033", "126"]),
        ("aime25", ["How many positive integers are at most 204?" + BOXED], ["204", "033", "126"]),
        ("amc23", ["How many positive integers are at most 204?" + BOXED], ["204", "033", "126"]),
        (
            "knights-knaves",
            [],
            ["(1) Ada is a knight\n(2) Ben is a knave", "(1) Cid is a knight\n(2) Dot is a knight"],
        ),
    ],
)
def test_rendered_rows(name, prompts, golds):
    rows = fixture_task(name).rows
    assert [user(row) for row in rows[: len(prompts)]] == prompts
    assert [row["solution"] for row in rows[: len(golds)]] == golds


def test_olympiadbench_puts_the_context_first():
    assert user(fixture_task("olympiadbench").rows[2]).startswith("Let $T=\\frac{1}{2}$.\n\nCompute $T$ plus one.\n")


def test_gpqa_shuffles_by_seed_and_row():
    rows = fixture_task("gpqa").rows
    assert user(rows[0]).startswith("Which of these is a boson?\n\nA) neutrino\nB) photon\nC) proton\nD) electron\n\n")
    assert [row["solution"] for row in rows] == ["B", "B", "A"]
    # Reproducible, and the same whatever comes before the row.
    assert fixture_task("gpqa").rows == rows
    assert fixture_task("gpqa", limit=2).rows == rows[:2]
    assert fixture_task("gpqa", seed=1).rows != rows
    for seed in range(5):
        for row, right in zip(fixture_task("gpqa", seed=seed).rows, ["photon", "strong", "mercury"], strict=True):
            assert f"\n{row['solution']}) {right}\n" in user(row)


def test_the_right_letter_of_gpqa_is_spread_evenly():
    render = BENCHMARKS["gpqa"].render
    row = {"Question": "q", "Correct Answer": "r", **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}}
    letters = [render(row, index, 0)["solution"] for index in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")


def test_livecodebench_tests_and_starter_code():
    stdin, functional, plain = fixture_task("livecodebench").rows
    assert json.loads(stdin["tests"])[1] == {"input": "-7\n", "output": "-14\n", "testtype": "stdin"}
    assert {test["fn_name"] for test in json.loads(functional["tests"])} == {"total"}
    assert "```python\nclass Solution:\n    def total(self, values: List[int]) -> int:\n```" in user(functional)
    assert "stdin" in user(stdin) and "stdin" not in user(functional)
    assert len(json.loads(plain["tests"])) == 2


def test_a_pickle_of_private_tests_runs_no_code():
    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    encoded = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="builtins.print"):
        _private_tests(encoded)


@pytest.mark.parametrize("name", ["math500", "knights-knaves", "livecodebench"])
def test_the_hub_is_asked_for_the_pinned_revision(name, monkeypatch):
    raw = Dataset.from_json(str(FIXTURES / f"{name}.jsonl"))
    asked = {}

    def load_dataset(path, **options):
        asked.update(path=path, **options)
        return raw

    monkeypatch.setattr(tasks, "load_dataset", load_dataset)
    task = load_task(name, name)
    assert len(task.rows) == 3 and task.source["revision"] == BENCHMARKS[name].revision
    if name == "livecodebench":
        # The repository's loading script is one that datasets no longer runs, so its file is read.
        revision = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
        assert asked["data_files"] == f"hf://datasets/livecodebench/code_generation_lite@{revision}/test6.jsonl"
    else:
        assert asked["path"] == BENCHMARKS[name].hub_id and asked["revision"] == BENCHMARKS[name].revision
        assert asked["name"] == BENCHMARKS[name].config and asked["split"] == BENCHMARKS[name].split


def test_a_file_of_another_schema_is_refused():
    with pytest.raises(ValueError, match="lacks the columns problem of math500's raw schema"):
        load_task("math500", "math500", str(FIXTURES / "amc23.jsonl"))


def test_prompting():
    prompting = Prompting(system_prompt="Be brief.", template="Q: {prompt}")
    row = fixture_task("amc23", prompting=prompting).rows[2]
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: What is 9 choose 4?"},
    ]
    plain = fixture_task("amc23", prompting=Prompting(chat_template=False)).rows[2]
    assert plain["prompt"] == "What is 9 choose 4?" + BOXED
    # SimpleRL's finished prompt is text, whatever the tokenizer has.
    finished = fixture_task("amc23", prompting=Prompting(template="qwen-boxed")).rows[2]["prompt"]
    assert finished.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 9"
    )
    with pytest.raises(ValueError, match="did you mean `boxed`"):
        Prompting(template="boxd")
    for options in ({"chat_template": False}, {"template": "abel"}):
        with pytest.raises(ValueError, match="`system_prompt` needs conversations"):
            Prompting(system_prompt="x", **options)


@pytest.fixture
def own(tmp_path):
    rows = [{"ask": f"{i}+1=", "gold": str(i + 1), "completion": "x"} for i in range(4)]
    path = tmp_path / "my rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("file", ["my rows.jsonl", "rows.parquet"])
def test_rows_of_your_own(own, file):
    columns = {"prompt_column": "ask", "solution_column": "gold"}
    task = load_task("mine", str(own / file), limit=2, **columns)
    assert task.rows == [{"prompt": "0+1=", "solution": "1"}, {"prompt": "1+1=", "solution": "2"}]
    assert task.grader_name == "trl_bridge.rewards.math_reward"
    put = load_task("mine", str(own / file), prompting=Prompting("Add.", "Q {prompt}"), **columns)
    assert [message["content"] for message in put.rows[3]["prompt"]] == ["Add.", "Q 3+1="]
    assert put.fingerprint != task.fingerprint
    with pytest.raises(ValueError, match="no column `prompt`; name it with `prompt_column`"):
        load_task("mine", str(own / file))
    with pytest.raises(ValueError, match="no such split"):
        load_task("mine", str(own / file), dataset_split="test", **columns)


def test_generated_tasks_have_their_own_graders():
    task = load_task("sums", "builtin:addition", dataset_config="test_size=5")
    assert len(task.rows) == 5 and task.grader_name.endswith(".answer_reward")
    pytest.importorskip("reasoning_gym")
    task = load_task("sums", "reasoning-gym:chain_sum", dataset_config="size=2 test_size=3")
    assert len(task.rows) == 3 and task.grader_name.endswith(".reasoning_gym_reward")
    assert set(task.rows[0]) == {"prompt", "solution", "metadata"}
    put = load_task(
        "sums", "reasoning-gym:chain_sum", dataset_config="size=2 test_size=3", prompting=Prompting("S", "boxed")
    )
    assert [message["role"] for message in put.rows[0]["prompt"]] == ["system", "user"]
    assert put.rows[0]["prompt"][1]["content"].endswith("within \\boxed{}.")


def test_the_list_of_benchmarks():
    assert parse_benchmarks("math500, aime24=raw/a.jsonl,data/mine.jsonl,builtin:addition,org/name") == {
        "math500": ("math500", None),
        "aime24": ("aime24", "raw/a.jsonl"),
        "mine": ("data/mine.jsonl", None),
        "builtin-addition": ("builtin:addition", None),
        "org-name": ("org/name", None),
    }
    with pytest.raises(ValueError, match="names 'mine' twice"):
        parse_benchmarks("a/mine.jsonl,b/mine.parquet")
    with pytest.raises(ValueError, match="`benchmarks` is empty"):
        parse_benchmarks(" , ")
