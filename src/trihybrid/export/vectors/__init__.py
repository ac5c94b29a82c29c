"""Vectors: inputs, outputs and states of a model, layer by layer, for whoever writes it again in another engine."""
