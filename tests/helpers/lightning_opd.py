"""Lightning OPD's runs of the self-test."""

from trl_bridge.selftest.lightning import *  # noqa: F403
