"""Merge runs, publish a run as the reference, and show it on one page."""
