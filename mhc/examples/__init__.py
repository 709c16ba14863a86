"""Example programs that train with mhc."""
