"""GRPO with a demonstration stream: the template that every stream trainer fills, and what it stands on."""
