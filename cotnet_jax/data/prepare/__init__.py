"""Writing ImageNet, or any folder of pictures, as a TFDS dataset in ArrayRecord, once.

Run by `python -m cotnet_jax.data.prepare`; needs no TensorFlow.
"""
