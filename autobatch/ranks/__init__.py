"""Ranks that probe together: what they tell each other, and how a trial ends on all of them at once."""
