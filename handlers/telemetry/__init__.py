"""Whoever observes: counts, traces."""
