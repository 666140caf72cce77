"""The page of a data set: its pictures as training sees them, its counts, and what is odd in it."""
