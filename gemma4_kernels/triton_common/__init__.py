"""What the Triton kernels of all families share. `support` does not import Triton; the rest does."""
