"""The only place that knows the driver: addresses, copies, host memory, of the CPU and of a GPU."""
