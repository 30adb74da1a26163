"""Serving: sequences, pages and the scheduler (no jax); the engine; the OpenAI-compatible server."""
