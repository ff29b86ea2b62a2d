"""`trl-bridge srft`, and `accelerate launch -m trl_bridge.scripts.srft`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("srft")
