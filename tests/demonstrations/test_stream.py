import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bridge.demonstrations.stream import DemonstrationStream, PromptIndex, fingerprint, window_share


def test_each_epoch_shows_every_demonstration_once_in_a_new_order():
    stream = DemonstrationStream(7, seed=3)
    epochs = [stream.draw(7) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != epochs[2]
    assert stream.epoch == 3.0


@given(counts=st.lists(st.integers(0, 12), max_size=8), size=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_how_the_draws_are_cut_changes_nothing(counts, size):
    whole, parts = DemonstrationStream(size, 0), DemonstrationStream(size, 0)
    assert whole.draw(sum(counts)) == [index for count in counts for index in parts.draw(count)]
    assert whole.epoch == parts.epoch == pytest.approx(sum(counts) / size)


def test_a_draw_may_cross_epochs():
    drawn = DemonstrationStream(3, seed=0).draw(8)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]
    assert len(set(drawn[6:])) == 2


def test_seeds_differ():
    assert DemonstrationStream(50, seed=0).draw(50) != DemonstrationStream(50, seed=1).draw(50)


@pytest.mark.parametrize("consumed", [0, 3, 5, 8, 10])
def test_resume_mid_epoch_and_at_its_end(consumed):
    stream = DemonstrationStream(5, seed=1)
    stream.draw(consumed)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = DemonstrationStream(5, seed=1)
    resumed.load_state_dict(state)
    assert resumed.epoch == stream.epoch == consumed / 5
    assert resumed.draw(9) == stream.draw(9)


def test_resume_refuses_another_dataset_or_seed():
    state = DemonstrationStream(5, seed=1).state_dict()
    with pytest.raises(ValueError, match="`size` 5, this one 6"):
        DemonstrationStream(6, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="`seed` 1, this one 2"):
        DemonstrationStream(5, seed=2).load_state_dict(state)


def test_nothing_global_is_touched():
    before = torch.get_rng_state()
    stream = DemonstrationStream(5, seed=1)
    stream.draw(12)
    PromptIndex(["a", "a"], seed=0).draw("a", 1, 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("arguments", [{"size": 0, "seed": 0}, {"size": 1, "seed": -1}])
def test_stream_arguments(arguments):
    with pytest.raises(ValueError, match="demonstration stream must"):
        DemonstrationStream(**arguments)
    with pytest.raises(ValueError, match="`count`"):
        DemonstrationStream(1, 0).draw(-1)


@pytest.mark.parametrize(("micro_batches", "world_size"), [(1, 1), (4, 1), (1, 4), (2, 2), (2, 3), (12, 1), (1, 12)])
def test_window_share_covers_the_window_once_in_order(micro_batches, world_size):
    indices = [10 * i for i in range(24)]
    shares = [window_share(indices, micro_batches, world_size, rank) for rank in range(world_size)]
    by_time = [
        i for micro_batch in range(micro_batches) for rank in range(world_size) for i in shares[rank][micro_batch]
    ]
    assert by_time == indices
    assert {len(share) for rank in shares for share in rank} == {24 // (micro_batches * world_size)}


def test_window_share_refuses_an_uneven_window():
    with pytest.raises(ValueError, match="5 demonstrations cannot be shared equally"):
        window_share(list(range(5)), 2, 1, 0)


def test_prompt_index_draws_uniformly_and_without_state():
    index = PromptIndex(["a", "b", "a", "c", "a"], seed=0)
    drawn = [index.draw("a", generation, group) for generation in range(100) for group in range(3)]
    counts = Counter(drawn)
    assert set(counts) == {0, 2, 4}
    # 300 draws at 1/3: 100 each, standard deviation 8.2; five of them.
    assert all(abs(count - 100) < 41 for count in counts.values())
    assert {index.draw("a", 0, group) for group in range(30)} == {0, 2, 4}
    again = PromptIndex(["a", "b", "a", "c", "a"], seed=0)
    assert [again.draw("a", generation, 2) for generation in reversed(range(100))] == drawn[2::3][::-1]
    assert drawn != [
        PromptIndex(["a", "b", "a", "c", "a"], seed=1).draw("a", g, k) for g in range(100) for k in range(3)
    ]
    assert index.draw("c", 0, 0) == 3


def test_prompt_index_names_what_is_missing():
    index = PromptIndex(["a", "b"], seed=0)
    assert index.missing(["b", "x", "a", "y", "x"]) == ["x", "y"]
    assert index.missing(["a"]) == []
    with pytest.raises(KeyError, match="no demonstration of the prompt x"):
        index.draw("x", 0, 0)
    assert index.missing(["x"]) == ["x"]


def rendered(input_ids, labels, **columns):
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels, **columns})


def test_fingerprint_is_of_the_content():
    base = fingerprint(rendered([[1, 2], [3]], [[-100, 2], [3]]))
    assert base == fingerprint(rendered([[1, 2], [3]], [[-100, 2], [3]], row=[5, 6]))
    selected = rendered([[9], [1, 2], [3]], [[9], [-100, 2], [3]]).select([1, 2])
    assert base == fingerprint(selected)
    others = [
        rendered([[3], [1, 2]], [[3], [-100, 2]]),
        rendered([[1], [2, 3]], [[-100], [2, 3]]),
        rendered([[1, 2], [3]], [[1, 2], [3]]),
        rendered([[1, 2]], [[-100, 2]]),
    ]
    assert len({base, *map(fingerprint, others)}) == 5


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from datasets import Dataset; from trl_bridge.demonstrations.stream import fingerprint;"
        "print(fingerprint(Dataset.from_dict({'input_ids': [[1, 2], [3]], 'labels': [[-100, 2], [3]]})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == fingerprint(rendered([[1, 2], [3]], [[-100, 2], [3]]))
    # Committed, so that a change of the format is seen: it would refuse every older checkpoint.
    assert out == "fa67bdfe029aeed049ef3c03ca7e80f356c3430b30a712972c9920d12594d4e2"
