"""A teacher as it lies on the disk: its folder's names, its tensors one at a time, and checks when it is loaded."""
