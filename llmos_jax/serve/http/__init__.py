"""The HTTP side of serving: OpenAI-compatible routes, keys, quotas, audit, metrics, the page."""
