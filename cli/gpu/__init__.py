"""`mhc-tune gpu`, which `make gpu` runs on a machine with a GPU: its plan, items, results and tables."""
