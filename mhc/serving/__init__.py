"""Serving: kernels that are found and loaded before the first request (docs/serving.md)."""
