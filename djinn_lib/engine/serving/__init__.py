"""Requests: queued, served in turns, the next models loaded ahead. Nothing listens on a socket."""
