"""From the size that is asked for to the layout of a cache: arithmetic on numpy arrays, no files, no llama.cpp."""
