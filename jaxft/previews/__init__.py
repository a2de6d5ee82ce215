"""What `python -m jaxft.preview` finds out about a run's rows, and shows on a terminal and as a page; without JAX."""
