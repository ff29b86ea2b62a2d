"""Every method, one file or one folder each; `catalogue.py` lists them."""
