"""Commands of `mhc-tune`, one a file."""
