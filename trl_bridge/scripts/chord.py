"""`trl-bridge chord`, and `accelerate launch -m trl_bridge.scripts.chord`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("chord")
