"""`trl-bridge uft`, and `accelerate launch -m trl_bridge.scripts.uft`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("uft")
