"""The tasks that a comparison can train on."""
