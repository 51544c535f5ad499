"""Compares the hooks that the vLLM plugin uses in two releases of vLLM, without importing either.

    python tools/check_vllm_hooks.py .venv-vllm/lib/python3.11/site-packages /tmp/vllm-0.33.0

Each argument is a folder that holds ``vllm/``: site-packages, or an unpacked wheel
(``pip download vllm==0.33.* --no-deps``, then ``unzip``). A hook is a class, function, method, or field with its
parameters; bodies are not compared. Exits 1 where a hook is missing or takes other parameters in the second.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

#: File below ``vllm/`` and what the plugin takes from it: classes, functions, methods, fields of a dataclass or enum.
HOOKS = {
    "v1/attention/backends/registry.py": (
        "register_backend",
        "AttentionBackendEnum.CPU_ATTN",
        "AttentionBackendEnum.FLASH_ATTN",
        "AttentionBackendEnum.TRITON_ATTN",
        "AttentionBackendEnum.FLASHINFER",
        "AttentionBackendEnum.get_path",
        "AttentionBackendEnum.is_overridden",
    ),
    "v1/attention/backend.py": (
        "AttentionBackend.customize_spec",
        "AttentionBackend.full_cls_name",
        "AttentionBackend.get_impl_cls",
        "AttentionBackend.get_builder_cls",
        "AttentionMetadataBuilder.__init__",
        "AttentionMetadataBuilder.build",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        "AttentionMetadataBuilder.get_cudagraph_support",
        "AttentionMetadataBuilder.supports_update_block_table",
        "AttentionCGSupport.ALWAYS",
        "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE",
        "AttentionCGSupport.NEVER",
        "AttentionImplBase.process_weights_after_loading",
        "CommonAttentionMetadata.query_start_loc",
        "CommonAttentionMetadata.query_start_loc_cpu",
        "CommonAttentionMetadata.seq_lens",
        "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        "CommonAttentionMetadata.num_reqs",
        "CommonAttentionMetadata.max_query_len",
        "CommonAttentionMetadata.max_seq_len",
        "CommonAttentionMetadata.block_table_tensor",
        "CommonAttentionMetadata.is_prefilling",
        "CommonAttentionMetadata.req_idx",
        "CommonAttentionMetadata._num_computed_tokens_cache",
        "CommonAttentionMetadata._token_to_req_indices_cache",
        "CommonAttentionMetadata.replace",
    ),
    "v1/attention/backends/cpu_attn.py": (
        "CPUAttentionBackend.forward_includes_kv_cache_update",
        "CPUAttentionBackendImpl.forward",
        "CPUAttentionMetadataBuilder.build",
    ),
    "v1/attention/backends/flash_attn.py": (
        "FlashAttentionBackend.forward_includes_kv_cache_update",
        "FlashAttentionImpl.forward",
        "FlashAttentionMetadataBuilder.__init__",
        "FlashAttentionMetadataBuilder.build",
    ),
    "v1/attention/backends/triton_attn.py": (
        "TritonAttentionBackend.forward_includes_kv_cache_update",
        "TritonAttentionImpl.forward",
        "TritonAttentionMetadataBuilder.build",
        "TritonAttentionMetadataBuilder.build_for_cudagraph_capture",
    ),
    "v1/attention/backends/flashinfer.py": (
        "FlashInferBackend.forward_includes_kv_cache_update",
        "FlashInferImpl.forward",
        "FlashInferMetadataBuilder.__init__",
        "FlashInferMetadataBuilder.build",
    ),
    "v1/kv_cache_interface.py": (
        "KVCacheSpec.block_size",
        "AttentionSpec.kv_quant_mode",
        "KVCacheSpec.copy_with_new_block_size",
        "KVCacheSpec.max_memory_usage_bytes",
        "AttentionSpec.max_num_blocks_per_req",
        "FullAttentionSpec.sliding_window",
        "FullAttentionSpec.attention_chunk_size",
        "FullAttentionSpec.non_causal",
        "KVQuantMode.NONE",
    ),
    "v1/kv_cache_spec_registry.py": (
        "KVCacheSpecRegistry.register",
        "KVCacheSpecRegistry._ensure_registered",
    ),
    "v1/core/single_type_kv_cache_manager.py": (
        "SingleTypeKVCacheManager.__init__",
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        "SingleTypeKVCacheManager.allocate_new_blocks",
        "SingleTypeKVCacheManager.add_local_computed_blocks",
        "SingleTypeKVCacheManager.cache_blocks",
        "SingleTypeKVCacheManager.pop_blocks_for_free",
        "SingleTypeKVCacheManager.remove_skipped_blocks",
        "SingleTypeKVCacheManager._remove_blocks_in_range",
        "SingleTypeKVCacheManager._get_num_evictable_blocks",
        "SingleTypeKVCacheManager.find_longest_cache_hit",
    ),
    "v1/core/kv_cache_utils.py": ("make_block_hash_with_group_id", "KVCacheBlock.block_hash"),
    "v1/core/block_pool.py": (
        "BlockPool.get_cached_block",
        "BlockPool.get_new_blocks",
        "BlockPool._insert_block_hash",
        "BlockPool.free_blocks",
        "BlockHashToBlockMap.get_one_block",
    ),
    "config/__init__.py": (),
    "config/compilation.py": (
        "CompilationConfig.cudagraph_mode",
        "CompilationConfig.max_cudagraph_capture_size",
        "CUDAGraphMode.has_full_cudagraphs",
    ),
    "config/vllm.py": (
        "VllmConfig.additional_config",
        "VllmConfig.max_in_flight_tokens",
        "get_current_vllm_config",
    ),
    "model_executor/layers/attention_layer_base.py": (
        "AttentionLayerBase.get_attn_backend",
        "AttentionLayerBase.get_kv_cache_spec",
    ),
    "plugins/__init__.py": ("load_general_plugins",),
}


def found_in(path: Path) -> dict[str, str]:
    """Every class, function, method and class-level name of a file, with its parameters where it has any."""
    if not path.exists():
        return {}
    names: dict[str, str] = {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                names[prefix + node.name] = "class"
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names[prefix + node.name] = _parameters(node.args)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[prefix + node.target.id] = "field"
            elif isinstance(node, ast.Assign):
                names.update(
                    {prefix + target.id: "field" for target in node.targets if isinstance(target, ast.Name)}
                )
            elif isinstance(node, (ast.If, ast.Try)):
                visit(node.body, prefix)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


def _parameters(arguments: ast.arguments) -> str:
    parts = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    parts += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    parts += [f"{one.arg}=" for one in arguments.kwonlyargs]
    parts += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"({', '.join(parts)})"


def differences(known: Path, other: Path) -> list[str]:
    """One line for each hook that is missing in either release, or takes other parameters."""
    lines = []
    for file, hooks in HOOKS.items():
        before, after = (found_in(folder / "vllm" / file) for folder in (known, other))
        for hook in hooks:
            old, new = before.get(hook), after.get(hook)
            if old is None or new is None:
                where = " and ".join(
                    str(folder) for folder, name in ((known, old), (other, new)) if name is None
                )
                lines.append(f"{file}: {hook} is missing in {where}")
            elif old != new:
                lines.append(f"{file}: {hook} was {old}, is {new}")
    return lines


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    lines = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(lines) or f"all {sum(map(len, HOOKS.values()))} hooks are there with the same parameters")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
