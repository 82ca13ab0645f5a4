"""The library: several models behind one ring of device memory."""
