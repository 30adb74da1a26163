"""Attention over a pool of pages, for mixed batches of prompt chunks and decoded tokens."""
