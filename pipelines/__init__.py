"""Shards, the DALI graph that reads them, and `Batch`, the one thing that passes to training.

Only the modules `dali`, `reader`, `views` and `colour` import DALI; `loader` does so on first use.
"""
