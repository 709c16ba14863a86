"""Recorded spaces: measuring and reading them, replaying searches against them, and how good a search was."""
