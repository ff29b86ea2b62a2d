"""`trl-bridge two-stage`, and `accelerate launch -m trl_bridge.scripts.two_stage`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("two-stage")
