"""The RL-only shadow: its model, its passes, its turns."""
