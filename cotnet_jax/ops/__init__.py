"""Array functions with gradients of their own, in XLA's form and as kernels."""
