"""Indexing of tars that others wrote, so that they are trained on where they lie."""
