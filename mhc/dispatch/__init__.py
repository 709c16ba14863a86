"""Dispatch: which kernel runs a call, and the operators that torch sees."""
