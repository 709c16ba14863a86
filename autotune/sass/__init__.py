"""SASS, a GPU's machine code: what the code of a compiled kernel tells without a GPU. It measures nothing."""
