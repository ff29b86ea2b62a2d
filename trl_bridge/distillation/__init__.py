"""Trainers that learn from a teacher's log-probabilities, and the stored scores that some of them read."""
