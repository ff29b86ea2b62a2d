"""Save and resume exactly."""
