"""Padded batches: the attention masks seen so far, and rows of sequences of different lengths."""
