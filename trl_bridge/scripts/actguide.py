"""`trl-bridge actguide`, and `accelerate launch -m trl_bridge.scripts.actguide`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("actguide")
