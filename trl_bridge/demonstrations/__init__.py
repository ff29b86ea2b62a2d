"""Demonstrations: rows to tokens, and the seeded, resumable order in which they are shown."""
