"""Lend models to users, guard their weights, and undo changes afterwards."""
