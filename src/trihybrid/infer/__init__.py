"""Running models: text in, text out."""
