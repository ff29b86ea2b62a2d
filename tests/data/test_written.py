"""Local files are read as they are written, or refused in one line."""

import gzip
import json

import pytest
from datasets import Dataset

from trl_bridge.data.files import respelt
from trl_bridge.data.rows import load_named_dataset


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, text):
    return load_named_dataset(write(path, text))["train"][:]


def test_no_text_becomes_a_date_a_number_or_a_null(tmp_path):
    dates = [
        {"prompt": f"2024-01-0{day}", "solution": f"2024-01-0{day}", "at": "2024-01-01T00:00:00"} for day in (1, 2)
    ]
    assert read(tmp_path / "dates.jsonl", lines(*dates))["solution"] == ["2024-01-01", "2024-01-02"]
    mixed = (
        '{"solution": "0.12345678901234567891", "expert": ["1"], "answer": "x"}\n'
        '{"solution": 3.10, "expert": [2, "b"], "answer": 1e5}\n'
        '{"solution": "null", "expert": null, "answer": true}\n{"solution": null}\n{"solution": true}\n'
    )
    got = read(tmp_path / "mixed.jsonl", mixed)
    assert got["solution"] == ["0.12345678901234567891", "3.10", "null", None, "true"]
    assert got["expert"] == [["1"], ["2", "b"], None, None, None]
    assert got["answer"] == ["x", "1e5", "true", None, None]
    numbers = '{"solution": 9007199254740993, "id": 9007199254740993, "share": 0.10, "big": 123456789012345678901}\n'
    got = read(tmp_path / "numbers.jsonl", numbers + '{"solution": 1.0, "id": 1, "share": 1, "big": 2}\n')
    assert got["solution"] == ["9007199254740993", "1.0"] and got["big"] == ["123456789012345678901", "2"]
    assert got["id"] == [9007199254740993, 1] and got["share"] == [0.1, 1.0]


def test_columns_that_hold_more_than_one_kind(tmp_path):
    spoken = [{"role": "user", "content": "x"}]
    got = read(tmp_path / "both.jsonl", lines({"prompt": "null"}, {"prompt": spoken}))
    assert got["prompt"] == ["null", spoken]
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": "q"})]
    rows = [{"messages": [*spoken, {"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    # No argument of the one call is filled into the other, be they in one part of the file or in two.
    assert read(tmp_path / "tools.jsonl", lines(*rows))["messages"] == [row["messages"] for row in rows]
    many = load_named_dataset(write(tmp_path / "many.jsonl", lines(*[{"messages": spoken}] * 10_000, *rows)))["train"]
    assert many[0]["messages"] == spoken and many[-1]["messages"] == rows[-1]["messages"]


def test_tables(tmp_path):
    got = read(tmp_path / "rows.csv", 'prompt,solution,level,x\n"a\nb",007,1,\n"c ""d""",,2,3.5\ne,null,3,\n')
    assert got["prompt"] == ["a\nb", 'c "d"', "e"] and got["solution"] == ["007", None, "null"]
    assert got["level"] == [1, 2, 3] and got["x"] == [None, 3.5, None]
    assert read(tmp_path / "rows.tsv", "prompt\tanswer\nq\t007\nr\t8\n")["answer"] == ["007", "8"]


@pytest.mark.parametrize("name", ["ROWS.JSONL", "rows.ndjson", "rows[1].jsonl", "a*b.jsonl", "rows.json", "rows.Csv"])
def test_names(name, tmp_path):
    text = "prompt\na\n" if name.endswith("Csv") else lines({"prompt": "a"})
    assert read(tmp_path / name, text) == {"prompt": ["a"]}


def test_compressed_files_brackets_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines({"prompt": "a"}).encode()))
    Dataset.from_dict({"prompt": ["a"]}).to_parquet(tmp_path / "rows[2].parquet")
    for name in ("~/rows.jsonl.gz", "~/rows[2].parquet", str(tmp_path / "*.jsonl.gz")):
        assert load_named_dataset(name)["train"][:] == {"prompt": ["a"]}


def test_json_over_several_lines_and_a_mark_at_its_start(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\ufeff" + lines(*rows), "\n" + lines(*rows)):
        assert read(tmp_path / "rows.json", text)["prompt"] == ["a", "b"]
    assert read(tmp_path / "rows.json", json.dumps(rows[0], indent=1))["prompt"] == ["a"]


def test_a_changed_file_is_read_again_and_streams_are_the_same_rows(tmp_path):
    assert read(tmp_path / "rows.jsonl", lines({"prompt": "a"}))["prompt"] == ["a"]
    assert read(tmp_path / "rows.jsonl", lines({"prompt": "b"}))["prompt"] == ["b"]
    streamed = load_named_dataset(str(tmp_path / "rows.jsonl"), streaming=True)["train"]
    assert list(streamed) == [{"prompt": "b"}] and streamed.column_names == ["prompt"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("torn.jsonl", lines({"prompt": "a"}) + '{"prompt": "b', "torn.jsonl line 2 is no JSON"),
        ("one.jsonl", '{"prompt": "b', "one.jsonl line 1 is no JSON"),
        ("empty.jsonl", "", "empty.jsonl has no rows"),
        ("empty.csv", "prompt,solution\n", "empty.csv has no rows"),
        ("list.json", "[]", "list.json has no rows"),
        ("number.jsonl", "3\n", "line 1 is no mapping of columns"),
        ("short.csv", "prompt,solution\na\n", "short.csv line 2 has 1 cells, the header 2"),
        ("quote.csv", 'prompt\n"a\n', "cut off or damaged"),
        ("latin.jsonl", '{"prompt": "ä"}'.encode("latin1"), "is not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(lines({"prompt": "a"}).encode() * 99, mtime=0)[:-12], "cut off or damaged"),
        ("rows.txt", "a\n", "data files end in one of .json, .jsonl"),
        ("rows", "a\n", "got no ending"),
        ("rows.parquet.gz", "a\n", "data files end in one of"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        load_named_dataset(str(path))


@pytest.mark.parametrize("name", ["~/nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere.jsonl", "nowhere[1].csv"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such dataset file"):
        load_named_dataset(name)


def test_golds_that_other_readers_rewrite(tmp_path):
    text = '{"solution": 9007199254740993}\n{"solution": "9007199254740993"}\n{"solution": 3}\n{"solution": 3.10}\n'
    assert list(respelt(write(tmp_path / "a.jsonl", text), "solution")) == [(0, "9007199254740993"), (3, "3.10")]
    table = write(tmp_path / "a.csv", "solution\n007\n7\nNA\nx\n1e5\n")
    assert list(respelt(table, "solution")) == [(0, "007"), (2, "NA"), (4, "1e5")]
