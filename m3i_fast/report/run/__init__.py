"""The page of a run, finished or going on."""
