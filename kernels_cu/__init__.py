"""CUDA sources of the kernels, read through importlib.resources."""
