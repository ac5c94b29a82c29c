"""Recipes: one YAML file from a teacher to a measured student."""
