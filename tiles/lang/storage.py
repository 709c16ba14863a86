"""Sizes of the storage that the language gives programs: plain numbers, which schedules count with."""

OWNED_REGISTERS = 64
"""Floats of one array of its own that a CUDA thread keeps in registers; a longer one is in shared memory."""

ROW_PADDING = 8
"""Elements after each row of a tile in shared memory that threads reach eight rows at a time, a few bytes in each: the
rows begin in other banks then."""

DOT_LANES = 16
"""On a CPU a running dot product is one vector of partial sums, of at most this many lanes
(`tiles.compiler.cpu_prelude`)."""
