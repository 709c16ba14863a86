"""Kernels, and all that a kernel needs from its program to a call: language, compiler, cache, packs, runtime."""
