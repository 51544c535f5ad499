"""``LagKVCache``: a cache that grows with the tokens it is given."""
