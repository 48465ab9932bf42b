"""The norms between the sublayers of a layer: one function, `sandwich_norm`."""
