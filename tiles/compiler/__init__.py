"""The compiler: a kernel's problem, schedule and target become a shared library."""
