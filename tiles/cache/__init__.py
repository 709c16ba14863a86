"""The kernel cache: records and binaries in a folder, found by key."""
