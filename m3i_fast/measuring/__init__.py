"""The field's protocols on pictures of a user, by any encoder: `m3i-fast evaluate --data`."""
