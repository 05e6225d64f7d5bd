"""The training side of a plan: accumulation that equals the full batch, and the proof that it does."""
