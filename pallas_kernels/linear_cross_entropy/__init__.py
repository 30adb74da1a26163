"""Output projection and cross-entropy in one pass."""
