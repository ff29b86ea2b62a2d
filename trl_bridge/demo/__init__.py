"""`trl-bridge demo`: methods compared on a small verifiable task, in minutes on a CPU, nothing downloaded."""
