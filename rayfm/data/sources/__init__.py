"""Raw logs: one module a source."""
