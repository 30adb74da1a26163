"""Rotary position embeddings (arXiv:2104.09864)."""
