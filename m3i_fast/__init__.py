"""M3I pre-training."""
