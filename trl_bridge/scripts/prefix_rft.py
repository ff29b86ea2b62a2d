"""`trl-bridge prefix-rft`, and `accelerate launch -m trl_bridge.scripts.prefix_rft`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("prefix-rft")
