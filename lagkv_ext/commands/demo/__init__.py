"""``lagkv demo``: a real model reads a text and is asked for facts in it, with its cache whole and compressed."""
