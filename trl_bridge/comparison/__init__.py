"""`trl-bridge compare`: methods on the same data, rollouts, seeds and tuned learning rates, as a table and pictures."""
