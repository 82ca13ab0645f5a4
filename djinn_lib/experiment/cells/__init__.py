"""Cells: one system on one trace at one capacity, from its inputs to its rows."""
