"""Starts from the command line: ``lagkv demo``, ``evaluate``, ``profile``, and what only they use."""
