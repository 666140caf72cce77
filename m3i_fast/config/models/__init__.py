"""Sizes of the networks of `m3i_fast.models`: image encoders and the text encoder."""
