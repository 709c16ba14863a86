"""The command `mhc-tune`."""
