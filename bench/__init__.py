"""Cases, timing, records."""
