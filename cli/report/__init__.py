"""The report: one page about the studies of a cache."""
