"""What an evaluation found, drawn and in words; the page of one on pictures of a user's own."""
