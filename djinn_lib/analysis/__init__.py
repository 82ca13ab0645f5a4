"""Analyse a run: read its rows, compute metrics, judge claims, draw figures. Needs no torch."""
