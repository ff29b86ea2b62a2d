"""BRIDGE."""
