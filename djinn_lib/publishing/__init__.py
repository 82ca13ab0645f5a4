"""For those who publish a run as the reference: merged, scrubbed, shown on one page."""
