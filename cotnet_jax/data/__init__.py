"""Input: datasets, decoding, augmentation, and the batches for training and evaluation."""
