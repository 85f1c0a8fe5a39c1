"""Prepare ImageNet, or any folder of images, as a TFDS dataset in ArrayRecord; no TensorFlow.

The command is `cotnet-prepare`. Its stages: listing (what is there), plan (which
shard gets which image), dataset and shards (writing), checksums, report.
"""
