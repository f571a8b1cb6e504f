"""Pure functions on tensors: the mathematics of Infini-attention, without modules, processes or configuration."""
