"""Modules that published commands start; the command line is in `trl_bridge/cli/`."""
