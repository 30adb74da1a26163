"""Attention over a sequence that is split between devices."""
