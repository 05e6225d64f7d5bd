"""Training jobs that a probe can run: what a job is, where it is found, and the built-in ones."""
