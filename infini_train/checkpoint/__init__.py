"""Atomic, verified, layout-independent checkpoints: safetensors fragments and a JSON index."""
