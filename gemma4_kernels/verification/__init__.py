"""Verification of drafts and sampling: one family, `verify_drafts` and `sample_tokens`."""
