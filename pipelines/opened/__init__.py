"""Data that are open to be read: a split of one data set, a mixture of several, a few samples."""
