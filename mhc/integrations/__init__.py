"""Integrations: hyper-connections in models that others have written."""
