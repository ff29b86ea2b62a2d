import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, ModelConfig

from trl_bridge import cli
from trl_bridge.cli.arguments import FAMILY_ARGUMENTS
from trl_bridge.cli.datasets import load_splits
from trl_bridge.data.sources import SOURCES


FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
LIMR, OPENR1 = (f"source:{name}@{FIXTURES / name}.raw.jsonl" for name in ("limr", "openr1-math-46k"))
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture
def data(capsys):
    """Runs `trl-bridge data`: exit code and what it printed."""

    def run(*arguments):
        code = cli.main(["data", *map(str, arguments)])
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def rows(tmp_path):
    """Writes rows with a duplicate and a broken gold."""
    path = tmp_path / "rows.jsonl"
    pairs = [("1+1=", "2"), ("1+2=", "3"), ("1+1=", "2"), ("1+3=", r"\frac{")]
    path.write_text("".join(json.dumps({"question": q, "gold": a, "worked": a}) + "\n" for q, a in pairs))
    return path


COLUMNS = ("--prompt_column", "question", "--solution_column", "gold", "--expert_column", "worked")


# The tool


def test_ls_lists_sources_and_schema(data):
    code, shown = data("ls")
    assert code == 0
    for source in SOURCES.values():
        assert f"source:{source.name}\n" in shown and f"hub {source.hub_id} at" in shown
    for column in ("prompt", "solution", "completion", "expert"):
        assert f"\n  {column} " in shown


def test_ls_imports_no_torch():
    code = "import sys; from trl_bridge.cli import main; main(['data', 'ls']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and shown.stdout.strip().endswith("False")


def test_show_gives_rows_and_tokens(data):
    code, shown = data("show", OPENR1, "--rows", "2", "--prompt_template", "boxed")
    assert code == 0
    assert "3 rows with prompt, solution, completion" in shown and "row 1" in shown and "row 2" not in shown
    assert r"prompt (user): How many diagonals has a convex heptagon?\nPlease reason" in shown
    code, shown = data("show", LIMR, "--rows", "1", "--model", "builtin:tiny")
    assert code == 0 and "|<|im_start|>|a|s|s|i|s|t|a|n|t|\\n" in shown and "solution: 12" in shown


def test_check_exits_0_where_all_is_sound_and_1_where_not(data, rows, tmp_path):
    code, shown = data("check", OPENR1, "--model", "builtin:tiny", "--max_length", "500")
    assert code == 0 and shown.rstrip().endswith("sound")
    assert "trained," in shown and "|b|o|x|e|d|" in shown
    code, shown = data("check", rows, *COLUMNS)
    assert code == 1
    assert "row 2: the same as row 0" in shown and "does not parse" in shown
    assert "2 of 4 rows have something wrong" in shown and "Without --model" in shown
    code, shown = data("check", rows, *COLUMNS, "--golds", "none", "--model", "builtin:tiny", "--max_length", "5")
    assert code == 1 and "4 of 4 rows" in shown


def test_overlap_is_seen_through_the_template_and_by_a_benchmarks_name(data, rows, tmp_path):
    bench = tmp_path / "mine.jsonl"
    bench.write_text(json.dumps({"problem": "1+2=", "answer": "3"}) + "\n")
    for benchmarks in (str(bench), f"math500={bench}"):
        options = (*COLUMNS, "--prompt_template", "boxed", "--benchmarks", benchmarks)
        code, shown = data("check", rows, *options)
        assert code == 1 and "row 1: m" in shown and "'1+2='" in shown
    # The template alone, which all share, is no overlap.
    bench.write_text(json.dumps({"problem": f"8+8={BOXED}", "answer": "16"}) + "\n")
    code, shown = data("check", rows, *options)
    assert "questions shared with a benchmark        0" in shown


def test_prepare_writes_what_training_reads(data, rows, tmp_path):
    for name in ("out.jsonl", "sub/out.parquet"):
        output = tmp_path / name
        code, shown = data("prepare", LIMR, "--output", output, "--prompt_template", "boxed", "--system_prompt", "S")
        assert code == 0 and f"wrote 3 of 3 rows to {output}: " in shown
        reader = {".jsonl": "json", ".parquet": "parquet"}[output.suffix]
        written = load_dataset(reader, data_files=str(output))["train"][1]
        assert [message["role"] for message in written["prompt"]] == ["system", "user"]
        assert written["prompt"][1]["content"].endswith(BOXED) and written["solution"] == "3\\sqrt{3}"
    code, shown = data("prepare", rows, *COLUMNS, "--output", tmp_path / "clean.jsonl", "--clean")
    assert code == 0 and "wrote 2 of 4 rows" in shown
    code, shown = data("check", tmp_path / "clean.jsonl")
    assert code == 0
    options = ("--model", "builtin:tiny", "--max_prompt_length", "59", "--force")
    code, shown = data("prepare", OPENR1, "--output", tmp_path / "clean.jsonl", *options)
    assert code == 0 and "wrote 2 of 3 rows" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data"], "ACTION"),
        (["data", "chek", "x"], "chek"),
        (["data", "show"], "NAME"),
        (["data", "show", "source:limmr"], "did you mean `source:limr`"),
        (["data", "show", "nowhere.jsonl"], "no such dataset file: nowhere.jsonl"),
        (["data", "show", LIMR, "--dataset_split", "tset"], "no such split; it has: train"),
        (["data", "show", LIMR, "--prompt_column", "q"], "has no column 'q'"),
        (["data", "show", LIMR, "--prompt_template", "boxd"], "did you mean `boxed`"),
        (["data", "show", LIMR, "--prompt_template", "abel", "--system_prompt", "S"], "makes plain text"),
        (["data", "show", LIMR, "--rows", "-1"], "must not be negative"),
        (["data", "check", LIMR, "--max_length", "3"], "name the model with --model"),
        (["data", "check", LIMR, "--benchmarks", "none.jsonl"], "no such dataset file: none.jsonl"),
        (["data", "check", LIMR, "--golds", "maths"], "maths"),
        (["data", "prepare", LIMR], "--output"),
        (["data", "prepare", LIMR, "--output", "x.csv"], "must end in .jsonl or .parquet"),
        (["data", "prepare", LIMR, "--output", __file__], "must end in"),
        (["data", "prepare", LIMR, "--output", "x.jsonl", "--max_prompt_length", "3"], "name the model with --model"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-bridge")]
    assert said in line


def test_prepare_overwrites_only_when_told(capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit):
        cli.main(["data", "prepare", LIMR, "--output", str(tmp_path / "x.jsonl")])
    assert "--force overwrites it" in capsys.readouterr().err
    assert (tmp_path / "x.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("action", [[], ["ls"], ["show"], ["check"], ["prepare"]])
def test_help_exits_0(action, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *action, "--help"])
    assert stopped.value.code == 0 and "usage: trl-bridge data" in capsys.readouterr().out


# The same through the script arguments


def splits(family, evaluate=False, model="builtin:tiny", **arguments):
    script = FAMILY_ARGUMENTS[family][0](**{"dataset_name": OPENR1, **arguments})
    return load_splits(script, DatasetMixtureConfig(), evaluate, ModelConfig(model_name_or_path=model))


def test_sources_serve_every_family():
    for family in ("rl", "sft"):
        train = splits(family)["train_dataset"]
        assert {"prompt", "solution", "completion"} <= set(train.column_names)
    # Row by row: the first trace, or several.
    single, several = splits("group"), splits("group", dataset_config="traces=2")
    assert single["train_dataset"][0]["expert"][0]["content"].startswith("<think>\n7 * 4")
    assert several["train_dataset"][0]["expert"] == [single["train_dataset"][0]["expert"][0]["content"]]
    both = splits("stream", dataset_name=LIMR, sft_dataset_name=OPENR1, prompt_template="boxed")
    assert "completion" not in both["train_dataset"].column_names
    for split in ("train_dataset", "sft_dataset"):
        assert all(row["prompt"][-1]["content"].endswith(BOXED) for row in both[split])


def test_several_test_splits():
    made = {"dataset_name": "builtin:routes", "dataset_config": "images=true, size=3, test_size=2"}
    read = splits("rl", evaluate=True, dataset_test_split="map+table+both", **made)["eval_dataset"]
    assert {name: rows["mode"][:] for name, rows in read.items()} == {m: [m] * 2 for m in ("map", "table", "both")}
    one = splits("rl", evaluate=True, dataset_test_split="both", **made)["eval_dataset"]
    assert one["mode"][:] == ["both"] * 2 and splits("rl", dataset_test_split="none", **made)["eval_dataset"] is None
    with pytest.raises(
        ValueError, match="`dataset_test_split: text`: the dataset has no such split; it has: train, map,"
    ):
        splits("rl", evaluate=True, dataset_test_split="map+text", **made)


def test_template_system_prompt_and_length_act_in_this_order(caplog):
    # user\n...assistant\n and five marks around template and system prompt, one token per character.
    longest = max(
        len(q) for q in (row["prompt"][0]["content"] for row in splits("rl", dataset_name=LIMR)["train_dataset"])
    )
    full = longest + len(BOXED) + len("system\nS\nuser\n\nassistant\n") + 5
    options = {"dataset_name": LIMR, "prompt_template": "boxed", "system_prompt": "S"}
    assert len(splits("rl", **options, max_prompt_length=full)["train_dataset"]) == 3
    assert not caplog.text
    assert len(splits("rl", **options, max_prompt_length=full - 1)["train_dataset"]) == 2
    assert "1 of 3 rows of `dataset_name (train_dataset)`" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_prompt_length": 3}, "every prompt of `dataset_name (train_dataset)` (3 rows)"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1"),
        ({"prompt_template": "boxd"}, "did you mean `boxed`"),
        ({"prompt_template": "abel", "system_prompt": "S"}, "`system_prompt` needs conversations"),
        ({"dataset_name": "source:limmr"}, "did you mean `source:limr`"),
        ({"max_prompt_length": 9, "model": None}, "`model_name_or_path` is not set"),
    ],
)
def test_script_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError) as refused:
        splits("rl", **arguments)
    assert said in str(refused.value)


def test_local_parquet_by_script_argument(tmp_path):
    Dataset.from_list([{"prompt": "1+1=", "solution": "2"}]).to_parquet(tmp_path / "rows.parquet")
    train = splits("rl", dataset_name=str(tmp_path / "rows.parquet"), prompt_template="plain:Q: {prompt}\nA:")
    assert train["train_dataset"].to_list() == [{"prompt": "Q: 1+1=\nA:", "solution": "2"}]
