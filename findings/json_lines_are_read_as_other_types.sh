#!/usr/bin/env bash
# datasets 5.2.0: what `load_dataset("json", ...)` makes of answers that are strings in the file.
#
# Expected: "12", "null" and "[1]" stay the strings that they are; where the column also holds a number, an error, or strings.
# Seen:     one number among them, and every string that reads as JSON is decoded: "12" becomes 12, "null" None, "1e3" 1000.0, "[1]" a
#           list, and words stay words. A column whose strings are all ISO dates becomes datetimes ("2024-01-05" is midnight then, and
#           "2024-01-05T10:00:00Z" loses its zone), though a file in which one of them is a word does not.
# Hurts:    whoever grades answers of a JSON Lines file: the gold depends on what the other rows hold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "datasets==5.2.0"
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -20 "$folder/log"; exit 1; }
import datetime
import json
import tempfile

from datasets import load_dataset


def read(answers):
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/rows.jsonl", "w") as file:
            file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
        return load_dataset("json", data_files=file.name, split="train", cache_dir=f"{folder}/cache")["answer"][:]


cases = [
    (["12", "null", "1e3", "[1]", "blue"], ["12", "null", "1e3", "[1]", "blue"]),
    (["12", "null", "1e3", "[1]", "blue", 7], [12, None, 1000.0, [1], "blue", 7]),
    (["2024-01-05", "today"], ["2024-01-05", "today"]),
    (["2024-01-05", "2024-01-05T10:00:00Z"], [datetime.datetime(2024, 1, 5), datetime.datetime(2024, 1, 5, 10)]),
]
for written, seen in cases:
    got = read(written)
    print("written:", written, "\n   read:", got)
    assert got == seen, "changed: this finding is out of date"
PY
