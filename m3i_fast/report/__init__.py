"""The page that shows what a run learned, and what all pages of the project share."""
