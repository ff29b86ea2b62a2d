import json
import subprocess
import sys

import pytest

from tests.helpers.command import refusal
from trl_bridge import cli
from trl_bridge.cli.plot import PICTURES, read_log, series
from trl_bridge.comparison import figures


LOG = [
    {
        "step": 1,
        "loss": 0.5,
        "reward": 0.25,
        "bridge/gain": -0.5,
        "sft/weight_mean": 1.0,
        "efficiency/useful_tokens": 0.5,
    },
    {"step": 2, "loss": 0.4, "reward": 0.75, "sft/weight_mean": 0.5, "efficiency/useful_tokens": 0.75},
    {"step": 2, "eval_reward": 0.5},
    {"step": 2, "train_runtime": 3.0},
]


def write(folder, log, name="trainer_state.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"global_step": 2, "log_history": log}))
    return folder


def drawn_by(monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.update({path.name: self}))
    return drawn


def test_pictures_of_a_run(tmp_path, capsys):
    run = write(tmp_path / "run", LOG)
    assert cli.main(["plot", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    for (name, _, _), line in zip(PICTURES, said, strict=True):
        assert (run / name).read_bytes()[:4] == b"\x89PNG" and line.startswith(f"wrote {run / name} (")
    assert cli.main(["plot", str(run), "--output_dir", str(tmp_path / "new" / "pictures")]) == 0
    assert len(list((tmp_path / "new" / "pictures").iterdir())) == 4


def test_what_is_drawn_is_what_was_logged(tmp_path, monkeypatch):
    drawn = drawn_by(monkeypatch)
    cli.main(["plot", str(write(tmp_path, LOG))])
    lines = {line.get_label(): line for line in drawn["reward.png"].axes[0].get_lines()}
    assert set(lines) == {"reward", "eval_reward"}
    assert list(lines["reward"].get_xdata()) == [1, 2] and list(lines["reward"].get_ydata()) == [0.25, 0.75]
    assert list(lines["eval_reward"].get_xdata()) == [2]
    (gain,) = drawn["gain.png"].axes[0].get_lines()
    assert list(gain.get_xdata()) == [1] and list(gain.get_ydata()) == [-0.5]
    assert all(figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() for figure in drawn.values())


def test_only_what_was_logged_is_drawn(tmp_path, monkeypatch):
    drawn = drawn_by(monkeypatch)
    cli.main(["plot", str(write(tmp_path, [{"step": 1, "reward": 1.0}]))])
    assert list(drawn) == ["reward.png"]


def test_the_longest_log_is_read(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path / f"checkpoint-{step}", [{"step": n, "reward": 0.0} for n in range(1, step + 1)])
    assert len(read_log(tmp_path)) == 10
    assert len(read_log(tmp_path / "checkpoint-9")) == 9
    assert len(read_log(tmp_path / "checkpoint-2" / "trainer_state.json")) == 2
    write(tmp_path, [{"step": 11, "reward": 0.0}])
    assert read_log(tmp_path)[-1]["step"] == 11
    write(tmp_path / "stages" / "rl" / "checkpoint-3", LOG)
    assert read_log(tmp_path / "stages") == LOG


def test_metrics_that_were_not_logged_are_left_out():
    log = [*LOG, {"step": 3, "reward": None, "chord/mu": None}]
    assert series(log, ["reward", "chord/mu"]) == {"reward": ([1, 2], [0.25, 0.75])}


@pytest.mark.parametrize(
    "text", ["", '{"global_step": 2}', "[1, 2]", '{"log_history": [', '{"log_history": [1]}', '{"log_history": null}']
)
def test_a_damaged_log_is_named(tmp_path, capsys, text):
    (tmp_path / "trainer_state.json").write_text(text)
    assert f"{tmp_path / 'trainer_state.json'} is no trainer_state.json, or was cut off" in refusal(
        capsys, "plot", str(tmp_path)
    )


def test_nothing_to_draw(tmp_path, capsys):
    assert "there is no" in refusal(capsys, "plot", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no log" in refusal(capsys, "plot", str(tmp_path / "empty"))
    assert "holds no log" in refusal(capsys, "plot", str(write(tmp_path / "began", [])))
    run = write(tmp_path / "sft", [{"step": 1, "loss": 0.5}])
    assert "nothing that is drawn: none of reward, " in refusal(capsys, "plot", str(run))
    assert sorted(path.name for path in run.iterdir()) == ["trainer_state.json"]


def test_missing_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    run = write(tmp_path, LOG)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'trl-bridge[demo]'" in refusal(capsys, "plot", str(run))


def test_it_needs_no_torch(tmp_path):
    run = write(tmp_path, LOG)
    code = f"import sys; from trl_bridge import cli; cli.main(['plot', {str(run)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
