"""What a training step asks of a GPU: launches, copies, waits, allocations. No GPU is needed."""
