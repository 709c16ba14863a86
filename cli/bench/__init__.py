"""The benchmark: our kernels compared with torch and public peers in one run."""
