"""Readers of sources, one module a kind."""
