"""Every parallel layout against one process, on the machines of whoever asks."""
