"""Distillation of a converted student from its teacher: hidden alignment (stage 1), matching of outputs (stage 2)."""
