import sqlite3

import pytest

from trl_bridge.data.rows import load_named_dataset
from trl_bridge.data.search import SearchEngine, documents, search, search_dataset, search_reward


def test_everybodys_document_is_found_by_name():
    assert len(documents()) == len({name for name, _ in documents()}) == 120
    for name, text in documents():
        assert search(name) == f"{name} {text}"
        assert search(f"Where does {name.lower()} live?") == f"{name} {text}"


def test_results_come_best_first_and_no_query_is_read_as_syntax():
    engine = SearchEngine([("a b", "one two"), ("c", "two three"), ("d", 'a "b" -c')], results=2)
    assert engine.search("two three") == "c two three\na b one two"
    assert engine.search("c") == 'c two three\nd a "b" -c'
    for query in ("", '"', "NOT", "a AND", "text: x*", "(", "' OR 1=1 --", "NEAR(a b)"):
        assert isinstance(engine.search(query), str)
    assert engine.search("zzz") == engine.search("?") == "nothing found"


def test_nothing_can_write():
    engine = SearchEngine([("a", "b")])
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        engine._database.execute("DELETE FROM documents")
    assert engine.search("a") == "a b"


@pytest.mark.parametrize("hops", [1, 2])
def test_questions_are_answered_by_what_their_demonstrations_find(hops):
    splits = load_named_dataset("builtin:search", f"size=20, test_size=5, hops={hops}, seed=3")
    assert [len(splits[name]) for name in ("train", "test")] == [20, 5]
    questions = {row["prompt"][0]["content"] for split in splits.values() for row in split}
    assert len(questions) == 25
    for row in splits["train"]:
        assert len(row["completion"]) == 2 * hops + 1
        calls = [turn["tool_calls"][0]["function"] for turn in row["completion"] if turn.get("tool_calls")]
        results = [turn["content"] for turn in row["completion"] if turn["role"] == "tool"]
        assert [search(**call["arguments"]) for call in calls] == results
        assert f"lives in {row['solution']}." in results[-1]
        assert "".join(row["expert_steps"]) == row["plan"] and row["solution"] in row["expert_steps"][-1]
        assert not any(row["solution"] in step for step in row["expert_steps"][:-1])
        assert search_reward([row["completion"]], [row["solution"]]) == [1.0]
    assert search_dataset(20, 5, hops, 3)["train"][:] == splits["train"][:]


def said(content, **more):
    return [{"role": "assistant", "content": content, **more}]


def test_the_last_turn_is_what_counts():
    turns = [
        said("Reed Bay"),
        said(" reed bay. "),
        said("I say Reed Bay"),
        said(""),
        said("Reed Bay", tool_calls=[{}]),
    ]
    assert search_reward(turns, ["Reed Bay"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert search_reward([[{"role": "tool", "content": "Reed Bay"}]], ["Reed Bay"]) == [0.0]


@pytest.mark.parametrize(("changes", "message"), [({"hops": 3}, "`hops`"), ({"size": 121}, "120 people")])
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        search_dataset(**changes)
