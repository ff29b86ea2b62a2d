"""The distillation trainers' runs of the self-test."""

from trl_bridge.selftest.distillation import *  # noqa: F403
