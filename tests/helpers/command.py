"""What the command `trl-bridge` answers."""

import pytest

from trl_bridge import cli


def refusal(capsys, *arguments):
    """The one line that a refused command line prints; what comes with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    ours = [line for line in lines if line.startswith("trl-bridge")]
    assert len(ours) == 1 and not any("Traceback" in line for line in lines)
    return ours[0]
