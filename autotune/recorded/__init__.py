"""Recorded spaces: exhaustive measurement, file formats, replay of searches, and their score."""
