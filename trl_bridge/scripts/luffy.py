"""`trl-bridge luffy`, and `accelerate launch -m trl_bridge.scripts.luffy`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("luffy")
