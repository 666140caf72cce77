"""Training batches of views of any size and aspect, by a budget of tokens."""
