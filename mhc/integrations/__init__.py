"""Integrations: hyper-connections in existing models."""
