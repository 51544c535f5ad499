"""The version, in one place: read by setup.py and shown by ``python -m lagkv_ext info``."""

__version__ = "0.1.0"
