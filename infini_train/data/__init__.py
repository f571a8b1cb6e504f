"""Documents on disk, tokenizers, and the lanes that the training loop reads."""
