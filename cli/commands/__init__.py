"""The commands of `mhc-tune`, one per file."""
