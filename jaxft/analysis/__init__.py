"""What losses, answers and texts say about a run: statistics over plain numbers, without JAX."""
