"""The input side: where pictures come from, how they are augmented, and in which order."""
