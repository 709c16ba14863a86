"""What is found out about one compiled kernel: whether it is right, how fast it is, and how fast it could be."""
