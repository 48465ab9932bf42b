"""Quantised linear layers in Triton. `backend` holds the ops; nothing here is imported before its first call."""
