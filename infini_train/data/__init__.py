"""Datasets on disk, tokenizers, synthetic texts, and the lanes that the training loop reads."""
