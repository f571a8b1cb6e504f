"""Dry runs: what each rank of a layout would hold, found out on one machine."""
