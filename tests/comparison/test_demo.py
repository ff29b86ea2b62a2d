import json
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from trl_bridge import cli
from trl_bridge.cli import demo
from trl_bridge.comparison import figures
from trl_bridge.comparison.demo import Curve, demo_comparison, draw
from trl_bridge.comparison.file import load_comparison


METHODS = [row.name for row in load_comparison("comparison/demo").rows]


def test_the_whole_demo(tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--steps", "2", "--base_steps", "20", "--wrong_share", "1", "--output_dir", str(output)]
    assert cli.main(["demo", *options]) == 0
    shown = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert list(results["methods"]) == METHODS
    table = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 1 + len(METHODS)
    for name, result in results["methods"].items():
        (row,) = [line for line in table if line.startswith(f"| {name} ")]
        final = result["points"][-1]
        assert f" {final['accuracy']:.3f} " in row and f" {final['probability']:.3f} " in row
        assert [point["step"] for point in result["points"]] == [0, 1, 2]
        assert [point["rollouts"] for point in result["points"]] == [0, 64, 128]
    # All but the cold start begin at the base model.
    starts = [result["points"][0]["accuracy"] for name, result in results["methods"].items() if name != "cold start"]
    assert starts == [results["base"]["accuracy"]] * 4
    assert shown.count(" before ") == 3
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.num_parameters() > 100_000
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "model", "results.json"]


def test_the_commands_defaults_are_those_of_the_file():
    assert demo_comparison(120, 600, 0.5, 0) == load_comparison("comparison/demo")
    changed = demo_comparison(7, 9, 0.25, 3)
    assert (changed.steps, changed.seeds, changed.row("cold start").fields["sft_max_steps"]) == (7, [3], 7)
    (setting,) = changed.settings
    assert (setting.task.base_steps, setting.task.wrong_share) == (9, 0.25)


def test_the_picture_tells_lines_apart_by_colour_and_without(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    points = [{"rollouts": 0, "accuracy": 0.1}, {"rollouts": 320, "accuracy": 0.5}]
    draw([Curve(name, points) for name in METHODS], {"accuracy": 0.1}, "title", tmp_path / "x.png")
    (axes,) = drawn[0].axes
    lines = axes.get_lines()[1:]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(METHODS)
    assert len({line.get_color() for line in lines}) == len(METHODS)
    assert list(lines[0].get_xdata()) == [0, 320] and list(lines[0].get_ydata()) == [0.1, 0.5]
    assert axes.get_xlabel().startswith("rollouts") and "accuracy" in axes.get_ylabel()


def test_its_help_needs_no_torch():
    code = "import sys; from trl_bridge import cli; cli.main(['demo', '--help'])"
    code = f"import atexit; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert "--wrong_share" in shown and shown.splitlines()[-1] == "False"


def test_missing_matplotlib_is_said_before_training(monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'trl-bridge\\[demo\\]'"):
        demo.main(["--steps", "1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--wrong_share", "2"], "wrong_share"), (["--steps", "0"], "--steps"), (["--step", "3"], "--step")],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        demo.main(options)
