"""BRIDGE with theta, w and the shadow as LoRA adapters on one frozen base."""
