"""Registration of the plugin, run by vLLM in the API server, the engine core and every worker."""

from __future__ import annotations

import re

import lagkv_vllm

#: Attention backends of vLLM that the plugin stands in for, by their names in ``AttentionBackendEnum``.
BACKENDS = {
    "CPU_ATTN": "lagkv_ext.vllm.cpu_attn.LagKVCPUAttentionBackend",
    "FLASH_ATTN": "lagkv_ext.vllm.flash_attn.LagKVFlashAttentionBackend",
    "TRITON_ATTN": "lagkv_ext.vllm.triton_attn.LagKVTritonAttentionBackend",
    "FLASHINFER": "lagkv_ext.vllm.flashinfer.LagKVFlashInferBackend",
}
#: Releases whose hooks were checked: 0.32 by running, 0.33 by reading (tools/check_vllm_hooks.py).
KNOWN_VERSIONS = ("0.32", "0.33")


def register() -> None:
    """Stand in for vLLM's attention backends; without ``lagkv`` in ``additional_config`` they are vLLM's own."""
    import vllm

    version = ".".join(re.findall(r"\d+", vllm.__version__)[:2])
    if version not in KNOWN_VERSIONS:
        reason = f"lagkv_ext knows vLLM {' and '.join(KNOWN_VERSIONS)}, and this is {vllm.__version__}"
        lagkv_vllm.refuse(lambda name: reason)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from lagkv_ext.vllm import metrics
    from lagkv_ext.vllm.manager import register_specs

    register_specs()
    metrics.share()
    taken = set()
    for backend in AttentionBackendEnum:
        if backend.name not in BACKENDS:
            continue
        if backend.is_overridden() and not backend.get_path().startswith("lagkv_ext."):
            taken.add(backend.name)
        else:
            register_backend(backend, BACKENDS[backend.name])

    def reason_against(name: str) -> str | None:
        if name in taken:
            return "another plugin stands in for it already; use only one of the two (VLLM_PLUGINS chooses)"
        return None if name in BACKENDS else f"it works with {', '.join(BACKENDS)}"

    lagkv_vllm.refuse(reason_against)
