"""What all families do alike to call the compiled modules."""
