"""Modules: hyper-connection blocks, stacks of them, and their streams."""
