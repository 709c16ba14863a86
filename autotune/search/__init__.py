"""What a search chooses from, what it has seen, and what it tries next."""
