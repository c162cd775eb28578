"""nanocupy: a from-scratch LLM inference runtime in Python on CuPy."""
