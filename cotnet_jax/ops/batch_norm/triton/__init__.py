"""The batch normalisation's Triton kernels, and their launch on NVIDIA GPUs."""
