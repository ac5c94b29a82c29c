"""Models: the mixers put into transformers' own decoder layers."""
