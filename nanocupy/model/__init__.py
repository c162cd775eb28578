"""The decoder of LLaMA, Qwen2 and Qwen3: rotary frequencies, weight layout, the forward as data."""
