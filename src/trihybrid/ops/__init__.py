"""Tensor operators without modules: functions of tensors, each with a token-by-token reference and faster backends."""
