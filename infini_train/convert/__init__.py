"""Models of Hugging Face: their folders into checkpoints, and back."""
