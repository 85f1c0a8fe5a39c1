"""Writing ImageNet, or any folder of images, as a TFDS dataset in ArrayRecord, once.

Run by `python -m cotnet_jax.data.prepare`; needs no TensorFlow.
"""
