"""Every parallel layout against one process, on the machines at hand."""
