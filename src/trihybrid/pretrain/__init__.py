"""Training from scratch with the next-token loss."""
