"""The decoder, its families and its weights."""
