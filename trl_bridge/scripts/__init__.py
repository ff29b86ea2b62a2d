"""Training scripts behind the command line: one thin module for each method, all on the body in `train.py`."""
