"""`trl-bridge aopd`, and `accelerate launch -m trl_bridge.scripts.aopd`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("aopd")
