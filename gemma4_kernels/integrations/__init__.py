"""Runtimes that use the kernels. Each module imports its runtime only when it is imported itself."""
