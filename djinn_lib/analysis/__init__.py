"""What a run says: its rows read, counted, judged and drawn. Needs no torch."""
