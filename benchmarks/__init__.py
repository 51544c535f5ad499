"""Benchmarks of lagkv_ext: ``python -m benchmarks.run --help``."""
