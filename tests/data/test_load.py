import json

import pytest
from datasets import Dataset

from trl_bridge.data.rows import load_named_dataset, map_columns
from trl_bridge.data.templates import with_system_prompt


ROWS = [{"q": "1+1=", "a": "2"}, {"q": "2+1=", "a": "3"}]


def test_local_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet", "*.jsonl"):
        assert load_named_dataset(str(tmp_path / name))["train"].to_list() == ROWS
    with pytest.raises(FileNotFoundError, match="no such dataset file: .*missing.parquet"):
        load_named_dataset(str(tmp_path / "missing.parquet"))


def test_generated_tasks_by_name():
    data = load_named_dataset("builtin:addition", "max_number=4, size=12 test_size=5 wrong_share=0.5")
    assert (len(data["train"]), len(data["test"])) == (12, 5)
    wrong = [row["completion"] != row["solution"] for row in data["train"]]
    assert sum(wrong) == 6
    assert all(row["completion"] == row["solution"] for row in data["test"])
    gym = load_named_dataset("reasoning-gym:chain_sum", "size=3,test_size=1,max_terms=2")
    assert [len(gym[split]) for split in ("train", "test")] == [3, 1]


@pytest.mark.parametrize(
    ("config", "said"),
    [("sise=3", "no parameter 'sise'"), ("size", "`key=value`"), ("max_number=2, size=90", "there are 9 sums")],
)
def test_wrong_parameters_are_named(config, said):
    with pytest.raises(ValueError, match=said):
        load_named_dataset("builtin:addition", config)


def test_columns_are_mapped_and_make_way():
    rows = Dataset.from_list([{"prompt": "old", "q": "new", "a": "2"}])
    assert map_columns(rows, {"prompt": "q", "solution": "a", "expert": None}, "dataset_name").to_list() == [
        {"prompt": "new", "solution": "2"}
    ]
    with pytest.raises(ValueError, match="`dataset_name` has no column 'x'; it has: prompt, q, a"):
        map_columns(rows, {"prompt": "x"}, "dataset_name")


def test_system_prompt_in_every_format():
    system, user, assistant = (
        {"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"))
    )
    standard = with_system_prompt(Dataset.from_list([{"prompt": "U", "completion": "A", "solution": "A"}]), "S")
    assert standard[0] == {"prompt": [system, user], "completion": [assistant], "solution": "A"}
    spoken = with_system_prompt(Dataset.from_list([{"prompt": [user]}]), "S")
    assert spoken[0]["prompt"] == [system, user]
    messages = with_system_prompt(Dataset.from_list([{"messages": [user, assistant]}]), "S")
    assert messages[0]["messages"] == [system, user, assistant]
    own = {"role": "system", "content": "mine"}
    kept = with_system_prompt(Dataset.from_list([{"prompt": [own, user]}]), "S")
    assert kept[0]["prompt"] == [own, user]
