"""`trl-bridge sft`, and `accelerate launch -m trl_bridge.scripts.sft`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("sft")
