"""`trl-bridge naive-mix`, and `accelerate launch -m trl_bridge.scripts.naive_mix`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("naive-mix")
