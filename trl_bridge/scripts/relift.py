"""`trl-bridge relift`, and `accelerate launch -m trl_bridge.scripts.relift`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("relift")
