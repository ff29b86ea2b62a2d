"""BRIDGE (arXiv 2509.06948): trainer, config, and the two parts that stand beside the student."""
