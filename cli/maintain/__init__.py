"""Scripts of the maintainers: they are no commands of `mhc-tune`."""
