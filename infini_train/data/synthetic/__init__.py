"""Training texts made on the fly: passkey, needles and key-value recall, and the reader that lays them out."""
