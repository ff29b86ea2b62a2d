import importlib
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_bridge.data import sources
from trl_bridge.data.rows import load_named_dataset
from trl_bridge.data.sources import SOURCES, _openr1_220k, find_source
from trl_bridge.rewards import knights_knaves_reward, math_reward


FIXTURES = Path(__file__).parent / "fixtures"


def raw(name):
    return [json.loads(line) for line in (FIXTURES / f"{name}.raw.jsonl").read_text().splitlines()]


def local(name, config=None, split="train"):
    return load_named_dataset(f"source:{name}@{FIXTURES / name}.raw.jsonl", config)[split]


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: answers with the fixture and keeps what was asked for."""
    asked = []

    def load(hub_id, **arguments):
        asked.append((hub_id, arguments))
        name = next(source.name for source in SOURCES.values() if source.hub_id == hub_id)
        return DatasetDict({"train": Dataset.from_list(raw(name))})

    monkeypatch.setattr(sources, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", SOURCES)
def test_raw_rows_become_the_rows_that_are_stored(name):
    rows = local(name, "traces=3" if SOURCES[name].has_traces else None).to_list()
    assert rows == json.loads((FIXTURES / f"{name}.rendered.json").read_text())


@pytest.mark.parametrize("name", SOURCES)
def test_schema_and_rewards(name):
    source, rows = SOURCES[name], local(name)
    expected = {"prompt", "solution", *(["completion"] if source.has_traces else [])}
    assert set(rows.column_names) == expected
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in rows)
    reward = {"math_reward": math_reward, "knights_knaves_reward": knights_knaves_reward}[source.reward]
    if source.has_traces:
        # Every demonstration earns the reward of its own source, and nobody else's gold does.
        assert reward(list(rows["completion"]), list(rows["solution"])) == [1.0] * len(rows)
    else:
        boxed = [f"\\boxed{{{solution}}}" for solution in rows["solution"]]
        assert reward(boxed, list(rows["solution"])) == [1.0] * len(rows)


@pytest.mark.parametrize("name", SOURCES)
def test_the_hub_is_asked_for_the_pinned_revision(name, hub, caplog):
    source = SOURCES[name]
    rows = load_named_dataset(f"source:{name}")["train"]
    ((hub_id, arguments),) = hub
    assert hub_id == source.hub_id and arguments["revision"] == source.revision
    assert len(rows) >= 2
    warned = any("not pinned" in record.message for record in caplog.records)
    assert warned == (source.revision is None)


def test_a_commit_can_be_pinned(hub, caplog):
    commit = "0123456789abcdef0123456789abcdef01234567"
    load_named_dataset("source:limr", f"revision={commit}")
    assert hub[0][1]["revision"] == commit
    assert not any("not pinned" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match="local copy, which has no `revision`"):
        load_named_dataset(f"source:limr@{FIXTURES / 'limr'}.raw.jsonl", f"revision={commit}")


def test_the_commit_that_was_read_is_said(monkeypatch, caplog):
    rows, commit = Dataset.from_list(raw("limr")), "89abcdef0123456789abcdef0123456789abcdef"
    rows.info.download_checksums = {f"hf://datasets/GAIR/LIMR@{commit}/limr.json": {"num_bytes": 1}}
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: DatasetDict({"train": rows}))
    load_named_dataset("source:limr")
    assert any(f"`revision={commit}`" in record.message for record in caplog.records)


def test_revisions_are_whole_commits():
    for source in SOURCES.values():
        assert source.revision is None or (len(source.revision) == 40 and int(source.revision, 16))


def test_layouts_of_local_copies(tmp_path):
    rows = Dataset.from_list(raw("math-3to5"))
    folder = tmp_path / "copy" / "simplelr_qwen_level3to5"
    folder.mkdir(parents=True)
    rows.to_parquet(folder / "train.parquet")
    rows.select([0]).to_parquet(folder / "test.parquet")
    laid_out = load_named_dataset(f"source:math-3to5@{tmp_path / 'copy'}")
    assert {split: len(data) for split, data in laid_out.items()} == {"train": 3, "test": 1}
    # A folder without the hub's layout, with a file beside the data that is none.
    Dataset.from_list(raw("limr")).to_parquet(tmp_path / "limr.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(load_named_dataset(f"source:limr@{tmp_path / 'limr.parquet'}")["train"]) == 3
    (tmp_path / "copy2").mkdir()
    (tmp_path / "limr.parquet").rename(tmp_path / "copy2" / "a.parquet")
    (tmp_path / "dataset_infos.json").rename(tmp_path / "copy2" / "dataset_infos.json")
    assert len(load_named_dataset(f"source:limr@{tmp_path / 'copy2'}")["train"]) == 3


def test_people_choose_the_files(tmp_path):
    for people, row in zip((2, 3), raw("knights-knaves"), strict=False):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"people{people}_num1.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load_named_dataset(f"source:knights-knaves@{tmp_path}")["train"]) == 2
    (row,) = load_named_dataset(f"source:knights-knaves@{tmp_path}", "people=3")["train"]
    assert "Bo and Mia" in row["prompt"][0]["content"]


def test_streaming_gives_the_same_rows():
    name = f"source:openr1-math-220k@{FIXTURES / 'openr1-math-220k'}.raw.jsonl"
    assert list(load_named_dataset(name, streaming=True)["train"]) == load_named_dataset(name)["train"].to_list()


def test_rows_without_a_right_trace_are_left_out_with_a_word(caplog, tmp_path):
    assert len(local("openr1-math-220k")) == 2
    assert "1 of 3 rows have no right trace" in caplog.text
    (tmp_path / "wrong.jsonl").write_text(json.dumps(raw("openr1-math-220k")[2]) + "\n")
    with pytest.raises(ValueError, match="none of the 1 rows has a right trace"):
        load_named_dataset(f"source:openr1-math-220k@{tmp_path / 'wrong.jsonl'}")


def test_a_trace_without_its_flag_is_not_taken():
    row = {**raw("openr1-math-220k")[1], "correctness_math_verify": [False], "is_reasoning_complete": None}
    assert _openr1_220k(row).traces == ()


def test_traces_have_one_form():
    rows = local("deepmath", "traces=3")
    assert [len(row["expert"]) for row in rows] == [3, 2, 3]
    for row in rows:
        assert row["expert"][0] == row["completion"][0]["content"]
        assert all(trace.startswith("<think>\n") and trace.count("<think>") == 1 for trace in row["expert"])


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("source:limmr", None, "did you mean `source:limr`"),
        ("source:nothing-like-it", None, "there are: math-3to5"),
        ("source:limr@/no/such/file.jsonl", None, "no such dataset file: /no/such/file.jsonl"),
        ("source:limr@rows.txt", None, "no such dataset file"),
        (f"source:limr@{FIXTURES / 'deepmath'}.raw.jsonl", None, "no column 'prompt', 'answer'; it has: question"),
        (f"source:limr@{FIXTURES / 'limr'}.raw.jsonl", "people=3", "no parameter 'people'; it has: traces"),
        (f"source:limr@{FIXTURES / 'limr'}.raw.jsonl", "traces=2", "`traces` must be 1, got 2"),
        (f"source:deepmath@{FIXTURES / 'deepmath'}.raw.jsonl", "traces=0", "`traces` must be 1 or more, got 0"),
        (f"source:limr@{FIXTURES / 'limr'}.raw.jsonl", "name=x", "no parameter 'name'"),
    ],
)
def test_refusals(name, config, said):
    with pytest.raises((ValueError, OSError)) as refused:
        load_named_dataset(name, config)
    assert said in str(refused.value)


def test_without_the_hub_a_local_copy_is_named(monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(OSError, match="source:limr@PATH"):
        load_named_dataset("source:limr")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .json"):
        load_named_dataset(f"source:limr@{tmp_path}")


def test_find_source():
    assert find_source("limr").hub_id == "GAIR/LIMR"


def test_cached_rows_are_tied_to_the_code_that_made_them(tmp_path, monkeypatch):
    """datasets finds a function of a module by its name; what it does may have changed since the rows were cached."""
    monkeypatch.syspath_prepend(tmp_path)
    name, module = f"source:limr@{FIXTURES / 'limr'}.raw.jsonl", tmp_path / "converter_under_test.py"
    solutions = []
    for code in ("solution", "solution + '!'"):
        module.write_text(
            "from trl_bridge.data.sources import Example\n\n\ndef convert(row):\n    solution = row['answer']\n"
            f"    return Example(row['prompt'], {code})\n"
        )
        sys.modules.pop("converter_under_test", None)
        importlib.invalidate_caches()
        converter = importlib.import_module("converter_under_test")
        monkeypatch.setitem(SOURCES, "limr", SOURCES["limr"]._replace(convert=converter.convert))
        solutions.append(load_named_dataset(name)["train"]["solution"][0])
    assert solutions == ["12", "12!"]
