"""Files on disk: safetensors by ranges of bytes, folders that are written whole or not at all, the hub's cache."""
