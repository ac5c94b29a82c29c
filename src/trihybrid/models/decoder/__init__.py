"""Converted decoders: one adapter for all families of teachers, and the families that need nothing beyond it."""
