"""`accelerate launch -m trl_bridge.scripts.evaluate`, the name that earlier releases documented."""

from trl_bridge.cli.evaluate import launched


if __name__ == "__main__":
    launched()
