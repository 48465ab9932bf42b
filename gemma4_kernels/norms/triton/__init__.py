"""The norms between sublayers in Triton; nothing here is imported before its first call."""
