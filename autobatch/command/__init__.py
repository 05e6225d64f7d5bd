"""Probe any training command: what is substituted in it, the hook inside of it, and its processes."""
