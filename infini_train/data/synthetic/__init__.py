"""Texts made on the fly to train and to evaluate on: passkey, needles, recall and BABILong, their makers and their reader."""
