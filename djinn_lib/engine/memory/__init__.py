"""Pages: which frame holds what, where it is mapped, and who loses it."""
