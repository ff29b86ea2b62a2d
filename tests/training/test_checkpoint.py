"""Checkpoints that something has happened to, and two runs on one folder."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import concatenate_datasets

from tests.helpers.resume import saving_trainer
from tests.helpers.training import rl_rows, sft_rows, small_lora
from trl_bridge.training.checkpoint import folder as checkpoints
from trl_bridge.training.checkpoint import lock, resume
from trl_bridge.training.checkpoint.drift import rows_hash
from trl_bridge.training.checkpoint.rows import saved_rows, write_rows


MARKER = "bridge/complete.json"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    saving_trainer(folder, max_steps=2).train()
    return folder


@pytest.fixture
def run(tmp_path, finished_run, monkeypatch):
    """A copy of a run of two updates, whose warnings are heard."""
    for name in ("transformers", "trl_bridge"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def emptied(content):
    return b""


def cut(content):
    return content[: len(content) // 2]


def longer(content):
    return content + b"\0"


def flipped(content):
    changed = bytearray(content)
    changed[len(changed) // 3] ^= 4
    return bytes(changed)


def zeroed(content):
    # What a file system leaves of a file whose size it had written and whose content it had not.
    return bytes(len(content))


def damage(path, how):
    path.write_bytes(how(path.read_bytes()))


def test_marker_has_every_file_with_size_and_checksum(run):
    checkpoint = run / "checkpoint-2"
    files = json.loads((checkpoint / MARKER).read_text())["files"]
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert there == files.keys() | {MARKER}
    assert {"optimizer.pt", "trainer_state.json", "rng_state.pth", "bridge/shadow/rows-0.safetensors"} <= files.keys()
    assert all(size == (checkpoint / name).stat().st_size for name, (size, _) in files.items())


@pytest.mark.parametrize("how", [emptied, cut, longer, flipped, zeroed, None])
def test_whatever_is_damaged_is_noticed_and_named(run, how):
    checkpoint = run / "checkpoint-2"
    assert checkpoints.fault(checkpoint) is None
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink() if how is None else damage(path, how)
        assert path.relative_to(checkpoint).as_posix() in (checkpoints.fault(checkpoint) or ""), path
        path.write_bytes(content)
    assert checkpoints.fault(checkpoint) is None


def test_a_flipped_bit_of_the_marker_is_noticed_wherever_it_is(run):
    marker = run / "checkpoint-2" / MARKER
    content = marker.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        marker.write_bytes(changed)
        if _parsed(changed) != _parsed(content):  # of two blanks, one may be another blank
            assert MARKER in checkpoints.fault(run / "checkpoint-2"), (place, chr(content[place]), chr(changed[place]))


def _parsed(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize(("name", "how"), [("optimizer.pt", emptied), ("model.safetensors", flipped), (MARKER, cut)])
def test_an_older_whole_checkpoint_is_taken_for_a_damaged_one(run, caplog, name, how):
    damage(run / "checkpoint-2" / name, how)
    trainer = saving_trainer(run, max_steps=2)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    said = [record.message for record in caplog.records if "Passing over" in record.message]
    assert len(said) == 1 and "checkpoint-2" in said[0] and name in said[0] and "\n" not in said[0]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
    assert checkpoints.fault(run / "checkpoint-2") is None  # written anew


def test_damaged_checkpoints_alone_are_refused(run):
    for checkpoint in run.glob("checkpoint-*"):
        damage(checkpoint / "scheduler.pt", emptied)
    with pytest.raises(ValueError, match="resume_from_checkpoint.*no complete checkpoint"):
        saving_trainer(run).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-1' has a damaged scheduler.pt \(0 bytes of \d+\)"):
        saving_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-1"))


@pytest.mark.parametrize("how", [emptied, cut])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "bridge/rank-0.pt", "model.safetensors"])
def test_emptied_files_are_noticed_without_checksums(run, name, how):
    # As earlier releases wrote the marker.
    marker = run / "checkpoint-2" / MARKER
    said = json.loads(marker.read_text())
    del said["files"], said["checksum"]
    marker.write_text(json.dumps({**said, "parts": ["optimizer.pt", "scheduler.pt"]}))
    assert checkpoints.fault(run / "checkpoint-2") is None
    damage(run / "checkpoint-2" / name, how)
    if how is emptied or name.endswith(".json"):
        assert name in checkpoints.fault(run / "checkpoint-2")


def test_files_are_on_the_disk_before_the_marker(run, monkeypatch):
    checkpoint, order = run / "checkpoint-2", []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append("marker"), replace(path, to)))
    checkpoints.seal(checkpoint, 2, {"layout": {"world_size": 1}, "requirements": {}})
    before = {path.resolve() for path in order[: order.index("marker")]}
    assert {path.resolve() for path in checkpoint.rglob("*")} - {checkpoint / MARKER} <= before
    assert {checkpoint.resolve(), run.resolve(), checkpoint / f"{MARKER}.partial"} <= before
    assert order[-1] == checkpoint / "bridge"
    assert checkpoints.fault(checkpoint) is None


def test_older_checkpoints_stay_until_the_newest_is_whole(tmp_path, monkeypatch):
    seen = {}

    def spy(checkpoint, *args):
        seen[checkpoint.name] = {path.name for path in tmp_path.glob("checkpoint-*")}
        time.sleep(0.2)
        seal_it(checkpoint, *args)

    seal_it = checkpoints.seal
    monkeypatch.setattr(resume.checkpoints, "seal", spy)
    saving_trainer(tmp_path, max_steps=3, save_total_limit=1).train()
    assert seen["checkpoint-3"] == {"checkpoint-2", "checkpoint-3"}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_failing_disk_ends_the_run(tmp_path, monkeypatch):
    def full(checkpoint):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "flushed", full)
    with pytest.raises(OSError, match="No space left"):
        saving_trainer(tmp_path, max_steps=2).train()


def test_a_checkpoint_is_whole_when_it_is_uploaded(tmp_path, monkeypatch):
    uploaded = []
    trainer = saving_trainer(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(
        trainer, "_push_from_checkpoint", lambda folder: uploaded.append(checkpoints.fault(Path(folder)))
    )
    trainer.train()
    assert uploaded == [None, None] and trainer.args.push_to_hub


# Pickles


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_without_restrictions(run, monkeypatch):
    load, restricted = torch.load, []
    monkeypatch.setattr(
        torch,
        "load",
        lambda *args, **kwargs: (restricted.append(kwargs.get("weights_only")), load(*args, **kwargs))[1],
    )
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    saving_trainer(run, max_steps=3).train(resume_from_checkpoint=True)
    assert len(restricted) == 5 and all(restricted)  # ours, TRL's optimizer, scheduler and random numbers


@pytest.mark.parametrize(
    "name", ["bridge/shared.pt", "bridge/rank-0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_pickle_that_calls_something_is_refused(run, tmp_path, name):
    checkpoint = run / "checkpoint-2"
    torch.save(Evil(tmp_path / "called"), checkpoint / name)
    marker = json.loads((checkpoint / MARKER).read_text())
    checkpoints.seal(checkpoint, 2, {key: marker[key] for key in ("layout", "requirements")})
    with pytest.raises(pickle.UnpicklingError):
        saving_trainer(run, max_steps=3).train(resume_from_checkpoint=True)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01."])
def test_description_of_an_earlier_releases_rows_is_not_run(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "called")) if content is None else content)
    with pytest.raises(ValueError, match="resume_from_checkpoint.*metadata cannot be read"):
        list(saved_rows(tmp_path))
    assert not (tmp_path / "called").exists()


def test_rows_of_earlier_releases_are_read(tmp_path):
    tensors = {"weights/a": torch.randn(5, 3), "exp_avg/a": torch.randn(5, 3).bfloat16(), "weights/b": torch.randn(4)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path))
    found = {key: (start, rows[1:3]) for key, start, rows in saved_rows(tmp_path)}
    assert found.keys() == tensors.keys()
    assert all(start == 0 and torch.equal(rows, tensors[key][1:3]) for key, (start, rows) in found.items())


def test_rows_of_two_ranks(tmp_path):
    full = torch.randn(5, 3)
    write_rows(tmp_path, 0, {"weights/a": full[:3]}, lambda key: 0)
    write_rows(tmp_path, 1, {"weights/a": full[3:]}, lambda key: 3)
    assert [(start, rows.get_shape()) for _, start, rows in saved_rows(tmp_path)] == [(0, [3, 3]), (3, [2, 3])]
    assert torch.equal(torch.cat([rows[:] for _, _, rows in saved_rows(tmp_path)]), full)


# Two runs on one folder

HOLDER = """
import os, sys, time
from trl_bridge.training.checkpoint import lock
with lock.held(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, forks="no"):
    command = [sys.executable, "-c", HOLDER, str(folder), forks]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_on_a_folder_is_refused_while_the_first_is_alive(tmp_path):
    trainer = saving_trainer(tmp_path, max_steps=1)
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"`output_dir`.*is alive .process {process.pid} on ") as refusal:
            trainer.train()
        assert "\n" not in str(refusal.value) and not list(tmp_path.glob("checkpoint-*"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    trainer.train()
    assert not (tmp_path / lock.LOCK).exists()


def test_a_child_of_a_dead_run_does_not_hold_its_folder(tmp_path):
    process = holder(tmp_path, "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.held(str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / lock.LOCK).read_text()


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path, monkeypatch):
    trainer = saving_trainer(tmp_path, max_steps=1)
    with monkeypatch.context() as context:
        context.setattr(trainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    trainer.train()


def test_a_new_run_among_the_checkpoints_of_another_says_so(run, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        saving_trainer(tmp_path / "new", max_steps=1).train()
        saving_trainer(run, max_steps=2).train(resume_from_checkpoint=True)
        assert "`output_dir`" not in caplog.text
        saving_trainer(run, max_steps=1).train()
    said = [record.message for record in caplog.records if "`output_dir`" in record.message]
    assert len(said) == 1 and "up to checkpoint-2" in said[0] and "resume_from_checkpoint" in said[0]


# Resumed otherwise


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_dataset": rl_rows().select(range(12))}, "`train_dataset` has other rows"),
        ({"train_dataset": rl_rows().select([1, 0, *range(2, 16)])}, "`train_dataset` has other rows"),
        ({"train_dataset": rl_rows().add_column("level", [1] * 16)}, "`train_dataset` has other rows"),
        ({"sft_dataset": sft_rows().select(range(9))}, "`sft_dataset` has other rows"),
        ({"temperature": 0.5}, "`temperature` was 1.0, now 0.5"),
        ({"weight_decay": 0.3}, "`weight_decay` was 0.0, now 0.3"),
        ({"adam_beta2": 0.9}, "`adam_beta2` was 0.999, now 0.9"),
        (
            {"learning_rate": 1.0, "coordinator_learning_rate": 1e-2, "shadow_learning_rate": 1e-3},
            "`learning_rate` was",
        ),
        (
            {"peft_config": small_lora(r=2)},
            "`peft_config` (model.layers.0.mlp.down_proj was [4, 1.0], now [2, 2.0], and 13 more)",
        ),
    ],
)
def test_what_a_resumed_run_must_share_is_said_in_a_line(run, changes, said):
    with pytest.raises(ValueError, match="resume_from_checkpoint") as refusal:
        saving_trainer(run, **{"max_steps": 3, **changes}).train(resume_from_checkpoint=True)
    text = str(refusal.value)
    assert (
        said in text and "\n" not in text and "{" not in text and text.count(" now ") + text.count("other rows") == 1
    )


def other_reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bridge_lambda": 0.25}, "`bridge_lambda` was 0.5, now 0.25"),
        ({"beta": 0.1}, "`beta` was 0.0, now 0.1"),
        ({"loss_type": "grpo"}, "`loss_type` was 'dapo', now 'grpo'"),
        ({"epsilon": 0.3, "max_grad_norm": 0.5}, "`epsilon` was 0.2, now 0.3; `max_grad_norm` was 1.0, now 0.5"),
        ({"reward_funcs": other_reward}, "`reward_funcs` was ['digits_reward'], now ['other_reward']"),
        ({"lr_scheduler_type": "linear", "max_steps": 4}, "`lr_scheduler_type` was 'cosine', now 'linear'; `max_steps` was 2, now 4"),
        ({"logging_steps": 7, "save_steps": 2, "save_total_limit": 5, "run_name": "x", "dataloader_num_workers": 0}, None),
    ],
)  # fmt: skip
def test_what_a_resumed_run_does_otherwise_is_said_in_a_line(run, caplog, changes, said):
    with caplog.at_level("WARNING"):
        saving_trainer(run, **{"max_steps": 2, **changes}).train(resume_from_checkpoint=True)
    lines = [record.message for record in caplog.records if "other options" in record.message]
    assert len(lines) == (said is not None)
    assert said is None or (f"which count from here on: {said}." in lines[0] and "\n" not in lines[0])


def test_rows_are_compared_by_what_they_hold():
    rows = rl_rows()
    halves = concatenate_datasets([rows.select(range(5)), rows.select(range(5, 16))])
    assert rows_hash(rows) == rows_hash(halves) == rows_hash(rows.filter(lambda row: True, keep_in_memory=True))
    assert rows_hash(rows) != rows_hash(rows.select(range(15))) != rows_hash(rows.rename_column("prompt", "question"))
    assert rows_hash(rows.to_iterable_dataset()) is None
