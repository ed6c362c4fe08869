"""Reports of a run: console, metrics file, Weights & Biases and the page at the end."""
