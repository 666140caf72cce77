"""The data pipeline: shards, the backends that read them, and `Batch`, which training gets.

Only the modules of graph/ import DALI; `loader` does so on first use.
"""
