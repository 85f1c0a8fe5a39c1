"""Pooling on NVIDIA GPUs; ``launch`` and the kernels import triton."""
