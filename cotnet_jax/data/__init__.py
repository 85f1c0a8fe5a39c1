"""The input side: where images come from, how they are augmented, and in which order."""
