"""A trained model in use: loading, sampling, generation, and reading of long texts into its state."""
