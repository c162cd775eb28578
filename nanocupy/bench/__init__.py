"""Measurements for users: decode, prefill; random weights of a named public shape, no download."""
