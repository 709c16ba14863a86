"""Processes that compile, verify and time, and may crash, hang or run out of memory without harm to their owner."""
