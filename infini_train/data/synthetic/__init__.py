"""Texts made on the fly to train and to evaluate on, their makers and their reader."""
