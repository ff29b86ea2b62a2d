"""`trl-bridge lightning-opd`, and `accelerate launch -m trl_bridge.scripts.lightning_opd`."""

from trl_bridge.scripts.train import run


if __name__ == "__main__":
    run("lightning-opd")
