"""Speculative decoding: cheap guesses of several tokens, checked by the model in one forward."""
