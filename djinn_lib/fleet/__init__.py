"""The ring under engines of other processes: a broker, its clients, vLLM's workers, `Fleet`."""
