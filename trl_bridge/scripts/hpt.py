"""`trl-bridge hpt`, and `accelerate launch -m trl_bridge.scripts.hpt`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("hpt")
