"""Modules: hyper-connection blocks, stacks of them, the expansion to streams and their reduction."""
