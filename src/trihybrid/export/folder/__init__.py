"""A student as a folder that transformers loads by itself (`trust_remote_code`), its code beside its weights."""
