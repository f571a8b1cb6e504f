"""Pretrain, extend and evaluate language models with compressive memory (Infini-attention)."""

__version__ = "0.1.0"
