"""One module per source of quantised weights: each turns the tensors of its files into the fields of a QuantizedWeight."""
