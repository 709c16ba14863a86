"""Kernel families, one folder each, and what their specifications are made of."""
