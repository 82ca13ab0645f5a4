"""Simulate the ring with an analytic clock, and bound the bytes to load."""
