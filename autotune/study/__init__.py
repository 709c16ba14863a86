"""What is stored and survives kill -9: trials, who works on which, and what studies and records say of themselves."""
