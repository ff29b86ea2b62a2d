"""Objectives: pure functions of tensors that return a loss or weights, without access to a trainer."""
