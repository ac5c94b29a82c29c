"""Published students of the hxa07 family (OpenMOSE), read as students of ours.

`identify` says from a configuration which revision a folder holds and what its teacher was, `names` finds the tensors
of one layer under their several spellings, `read` puts a whole checkpoint together or says what does not fit, and
`write` writes it in our format.
"""
