"""`trl-bridge opd`, and `accelerate launch -m trl_bridge.scripts.opd`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("opd")
