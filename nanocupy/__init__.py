"""nanocupy: a from-scratch LLM inference runtime in Python on CuPy."""

__version__ = "0.1.0"  # the one place: pyproject.toml and `nanocupy --version` read it here
