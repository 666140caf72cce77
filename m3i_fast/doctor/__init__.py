"""What this machine can use: facts, and what they mean."""
