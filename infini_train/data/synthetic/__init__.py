"""Texts made on the fly to train and to evaluate on: passkey, needles and recall, their makers and their reader."""
