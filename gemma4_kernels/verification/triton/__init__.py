"""Verification and sampling in Triton; see docs/mtp.md."""
