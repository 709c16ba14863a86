"""Stored state that survives kill -9: trials, their leases, and the metadata of studies and records."""
