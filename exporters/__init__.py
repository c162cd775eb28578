"""Converters from other checkpoints to NanoInfer files."""
