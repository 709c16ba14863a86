"""`mhc-tune report`: studies as one HTML page or as data."""
