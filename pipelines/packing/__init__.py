"""Packing of the pictures of a user: what a source holds, as shards of this package."""
