"""Packs: a kernel cache as one signed file."""
