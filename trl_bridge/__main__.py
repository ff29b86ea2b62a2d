"""`python -m trl_bridge` is `trl-bridge`."""

from trl_bridge.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
