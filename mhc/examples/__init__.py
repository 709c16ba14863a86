"""Small programs that use mhc for real."""
