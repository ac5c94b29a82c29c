"""Compression: a compact model in few bytes (`quantize`), under a limit (`budget`), as one file (`artifact`)."""
