"""Compression of one layer: when it comes due, which rows it leaves, and the call of the operator."""
