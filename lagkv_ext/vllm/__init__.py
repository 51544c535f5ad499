"""LagKV in vLLM, without a fork or a patch (docs/vllm.md).

Installed, it does nothing until vLLM is asked for it: ``--additional-config '{"lagkv": {"keep_ratio": 0.25}}'``.
"""
