"""Attention masks: how transformers tells a cache of them, and how they follow the rows that are left."""
