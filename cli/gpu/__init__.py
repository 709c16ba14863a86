"""The GPU host's command: what `make gpu` runs."""
