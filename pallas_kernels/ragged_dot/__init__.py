"""Grouped matrix product for mixtures of experts."""
