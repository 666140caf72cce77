"""The data pipeline: shards, the DALI graphs that read them, and `Batch`, which training gets.

Only the modules dali, reader, views and colour of graph/ import DALI; `loader` does so on first
use.
"""
