import json

import pytest

from tests.helpers.evaluation import FIXTURES
from trl_bridge import cli
from trl_bridge.cli import evaluate
from trl_bridge.models import tiny_model, tiny_tokenizer


pytestmark = pytest.mark.usefixtures("quick_batches")
BASE = ["eval", "--model", "builtin:tiny", "--max_new_tokens", "6"]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-bridge eval: error: ")]
    return line


def test_help_exits_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: trl-bridge eval" in shown and "--benchmarks" in shown and "math500" in shown


def test_the_whole_way_on_a_saved_model(tmp_path, capsys):
    tokenizer = tiny_tokenizer(chat_template=True)
    model = tmp_path / "model"
    tiny_model(tokenizer, hidden_size=32, layers=2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "mine.jsonl").write_text('{"q": "1+1=", "a": "2"}\n{"q": "1+2=", "a": "3"}\n')
    files = [f"{name}={FIXTURES / name}.jsonl" for name in ("amc23", "gpqa", "knights-knaves")]
    command = ["eval", "--model", str(model), "--benchmarks", ",".join([*files, "builtin:addition"])]
    command += ["--max_new_tokens", "6", "--limit", "2", "--n", "3", "--output_dir", str(tmp_path / "out")]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    for name, grader in [("amc23", "math_reward"), ("gpqa", "choice_reward"), ("builtin-addition", "answer_reward")]:
        assert f"| {name} | 2 | 3 | T=1, top-p 0.95 | 0.0 | 0.0 to 65.8 | 0.0 |" in shown and f"| {grader} |" in shown
    mine = ["--benchmarks", str(tmp_path / "mine.jsonl"), "--prompt_column", "q", "--solution_column", "a"]
    own = [*command[:3], *mine, "--max_new_tokens", "6", "--grader", "closeness_reward", "--success_threshold", "0.01"]
    assert cli.main([*own, "--output_dir", str(tmp_path / "out")]) == 0
    # Another task in the same folder stands in the same table.
    shown = capsys.readouterr().out
    assert "| mine | 2 | 1 | greedy |" in shown and "| amc23 | 2 | 3 |" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"amc23", "builtin-addition", "gpqa", "knights-knaves", "mine"}
    assert results["mine"]["sampling"] == {"temperature": 0.0, "top_p": None, "max_new_tokens": 6}
    assert len(results["mine"]["model_details"]["weights"]) == 16
    # Trained further and saved at the same path: not the model of these results.
    tiny_model(tokenizer, hidden_size=32, layers=2, seed=1).save_pretrained(model)
    assert "`model` (" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval"], "the following arguments are required: --model, --benchmarks"),
        ([*BASE, "--benchmarks", "builtin:addition", "--temprature", "1"], "did you mean `--temperature`?"),
        ([*BASE, "--benchmarks", "builtin:addition", "--max-new", "1"], "unknown option `--max-new`"),
        ([*BASE, "--benchmarks", "builtin:addition", "--n", "x"], "invalid int value: 'x'"),
        ([*BASE, "--benchmarks", "builtin:addition", "--n", "0"], "`n` must be 1 or more"),
        ([*BASE, "--benchmarks", "builtin:addition", "--n", "2", "--temperature", "0"], "`n: 2` at temperature 0"),
        ([*BASE, "--benchmarks", "builtin:addition", "--limit", "0"], "`limit`"),
        ([*BASE, "--benchmarks", "builtin:addition", "--batch_size", "0"], "`batch_size`"),
        ([*BASE, "--benchmarks", "builtin:addition", "--top_p", "2", "--n", "2"], "`top_p`"),
        (
            [*BASE, "--benchmarks", "builtin:addition", "--max_new_tokens", "509"],
            "shortest prompt of builtin-addition has 4 tokens and builtin:tiny a context of 512, which leaves 508",
        ),
        ([*BASE, "--benchmarks", "builtin:addition", "--grader", "math_rewrad"], "did you mean `math_reward`?"),
        ([*BASE, "--benchmarks", "builtin:addition", "--grader", "code_reward"], "does not take the rows"),
        ([*BASE, "--benchmarks", "builtin:addition", "--dtype", "bfloat16"], "remove `dtype: bfloat16`"),
        ([*BASE, "--benchmarks", "builtin:addition", "--dtype", "int3"], "invalid choice: 'int3'"),
        ([*BASE, "--benchmarks", "builtin:addition", "--use_vllm"], "`use_vllm` needs a model on disk"),
        ([*BASE, "--benchmarks", "builtin:addition", "--dataset_split", "tset"], "it has: train, test"),
        ([*BASE, "--benchmarks", "builtin:addition", "--chat_template_kwargs", "[1]"], "is no JSON mapping"),
        ([*BASE, "--benchmarks", "builtin:addition", "--prompt_template", "boxd"], "did you mean `boxed`?"),
        ([*BASE, "--benchmarks", "missing.jsonl"], "no such dataset file: missing.jsonl"),
        ([*BASE, "--benchmarks", ","], "`benchmarks` is empty"),
        ([*BASE, "--benchmarks", f"livecodebench={FIXTURES}/livecodebench.jsonl"], "TRL_BRIDGE_RUN_CODE=1"),
        (
            ["eval", "--model", "builtin:huge", "--benchmarks", "math500"],
            "builtin:tiny, builtin:tiny-tools, builtin:tiny-vision and builtin:smollm2-135m",
        ),
        (["eval", "--model", "./nowhere", "--benchmarks", "math500"], "there is no directory ./nowhere"),
    ],
)
def test_a_users_error_is_one_line(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRL_BRIDGE_RUN_CODE", raising=False)
    assert said in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_context_bounds_the_default_length(tmp_path):
    arguments = evaluate._parse(["--model", "builtin:tiny", "--benchmarks", "builtin:addition", "--limit", "1"])
    ((_, jobs, sampling),), *_ = evaluate._prepare(arguments, tmp_path, "2026-11-30")
    assert len(jobs[0].ids) == 4 and sampling.max_new_tokens == 508 and sampling.temperature == 0


def test_one_question_that_is_too_long_does_not_refuse_the_run(tmp_path, capsys):
    rows = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "1+" * 600, "solution": "2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [*BASE, "--benchmarks", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*line, "--max_new_tokens", "6"]) == 0
    assert "1 questions fill the model's context and count as wrong" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(SystemExit):
        cli.main(line)
    assert "which leaves 0" in capsys.readouterr().err


def test_the_default_folder_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*BASE, "--benchmarks", "builtin:addition", "--limit", "1"]) == 0
    assert (tmp_path / "eval_results" / "builtin-tiny" / "results.md").is_file()
