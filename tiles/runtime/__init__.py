"""The runtime: a compiled kernel called on torch tensors."""
