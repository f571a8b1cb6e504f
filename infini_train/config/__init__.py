"""The configuration of a run: a schema of frozen dataclasses, and the files it is read from. Imports no torch."""
