"""Linear layers over quantised weights: `weight.QuantizedWeight`, the formats it reads, and whole files of them."""
