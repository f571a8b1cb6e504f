"""Measurements of a trained model: perplexity, and text that it writes."""
