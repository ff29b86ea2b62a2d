"""`trl-bridge grpo`, and `accelerate launch -m trl_bridge.scripts.grpo`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("grpo")
