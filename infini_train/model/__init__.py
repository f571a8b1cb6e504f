"""The decoder: nn.Modules over megatron-core's parallel layers; no collectives of its own."""
