"""Worker processes that compile, verify and time kernels, isolated from the tuner."""
