"""`trl-bridge bridge`, and `accelerate launch -m trl_bridge.scripts.bridge`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("bridge")
