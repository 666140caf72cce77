"""The page of `m3i-fast evaluate MODEL --data DIR`, drawn from the files that it left."""
