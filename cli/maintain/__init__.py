"""Scripts for maintainers; none is a command of `mhc-tune`."""
