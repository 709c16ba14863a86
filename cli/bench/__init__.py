"""The benchmark: our kernels beside torch and public peers, in one run."""
