"""The settings of the objective: its terms, what they predict and by which loss, masks, weights."""
