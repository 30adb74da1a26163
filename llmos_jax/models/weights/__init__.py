"""Weights of other ecosystems, read and written through one name map a family."""
