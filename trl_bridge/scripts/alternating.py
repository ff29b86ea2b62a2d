"""`trl-bridge alternating`, and `accelerate launch -m trl_bridge.scripts.alternating`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("alternating")
