"""Evaluation of a frozen encoder: categories, captions, places, and features as colour."""
