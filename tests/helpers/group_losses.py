"""The group methods' losses of the self-test."""

from trl_bridge.selftest.group_losses import *  # noqa: F403
