"""The page of a run, and the template that all pages of the project share."""
