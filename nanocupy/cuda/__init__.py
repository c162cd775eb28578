"""All that touches CUDA apart from the ops: nothing outside this folder and ops/cuda_ops imports
CuPy. This module imports nothing, so that asking whether there is a GPU costs nothing."""
