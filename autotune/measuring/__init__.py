"""Measurements of a compiled kernel: correctness, time, resources, and the roofline."""
