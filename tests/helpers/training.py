"""Small runs of the real trainers, recorded and replayed: those of the self-test."""

from trl_bridge.selftest.runs import *  # noqa: F403
