"""The language of the programs: TileLang with one vocabulary for CPU and CUDA."""
