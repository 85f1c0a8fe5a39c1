"""Programs for developers: benchmarks, checks of kernels, tuning."""
