"""Crashes, hangs, signals and bad nodes: how ranks find out, report and end. NVIDIA's term for this is resiliency."""
