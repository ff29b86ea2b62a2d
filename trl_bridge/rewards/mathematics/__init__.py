"""Is this answer that number? What [`math_reward`] knows of mathematics."""
