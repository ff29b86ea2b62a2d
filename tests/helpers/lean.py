"""Lean mode's runs of the self-test."""

from trl_bridge.selftest.lean import *  # noqa: F403
