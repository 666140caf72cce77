"""Cells of pictures of any size and aspect: which are shown and predicted, and what reads them."""
