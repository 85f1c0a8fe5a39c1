"""The Triton kernels of local aggregation, and how they are launched."""
