"""The scheduler's side: allocates, frees, hashes and finds the blocks of the two cache groups.

No block is written twice, so both groups take part in vLLM's prefix caching. Raw blocks have vLLM's own keys. A kept
block's key is the chain hash at the end of its reference partition, which covers every token that it depends on, with
its place and the settings; a mixed block's key is the chain hash at the end of its raw source block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from lagkv_ext.vllm.metrics import RequestCounts
from lagkv_ext.vllm.plan import Plan
from lagkv_ext.vllm.settings import KEY
from lagkv_ext.vllm.specs import LagKVCompressedSpec, LagKVRawSpec, LagKVSpec

logger = logging.getLogger("vllm.lagkv")


class LagKVManager(SingleTypeKVCacheManager):
    """Parts that both groups have in common."""

    GROUP: ClassVar[int]  #: place of the group in the pairs that `Plan` returns

    def __init__(self, kv_cache_spec: LagKVSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plan: Plan = kv_cache_spec.plan
        self.plan.check()
        # vLLM asks at every step for every request, with one answer for a whole state.
        self.raw_from, self.entries = functools.cache(self.plan.raw_from), functools.cache(self.plan.entries)
        self.in_flight = kv_cache_spec.in_flight
        if self.enable_caching and self.block_pool.hash_block_size != self.block_size:
            raise ValueError(
                f"lagkv: prefix caching needs hashes of whole blocks ({self.block_size} tokens), but vLLM hashes "
                f"{self.block_pool.hash_block_size} tokens: other layers of this model have blocks of another size. "
                "Use --no-enable-prefix-caching."
            )

    def table_length(self, tokens: int) -> int:
        """Entries of the block table of a sequence that has room for ``tokens``."""
        raise NotImplementedError

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = self.req_to_blocks.get(request_id, ())
        new = max(self.table_length(num_tokens) - len(held) - len(new_computed_blocks), 0)
        if not (apply_admission_cap or new_computed_blocks):
            return new  # a running request
        if apply_admission_cap:
            # A sequence that is admitted as a whole gives blocks back on its way: what counts is its peak.
            real = sum(not block.is_null for blocks in (held, new_computed_blocks) for block in blocks)
            new = max(min(new, self.plan.peak(num_tokens, self.in_flight)[self.GROUP] - real), 0)
        return new + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        table = self.req_to_blocks[request_id]
        count = self.table_length(num_tokens) - len(table)
        if count <= 0:
            return []
        new = self.block_pool.get_new_blocks(count)
        table.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new


class LagKVRawManager(LagKVManager):
    GROUP = 0

    def __init__(self, kv_cache_spec: LagKVRawSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.counts = RequestCounts.of_pool(self.block_pool, self.plan)

    def table_length(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self.counts is not None:
            self.counts.scheduled(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        if self.counts is not None:
            self.counts.cached(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        if self.counts is not None and self.counts.seen(request):
            _warn_of_request_settings(request)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if self.counts is not None:
            self.counts.freed(request_id)
        return super().pop_blocks_for_free(request_id)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        end = self.raw_from(processed_computed_tokens // self.plan.boundary)
        self._remove_blocks_in_range(request_id, self.plan.sink_blocks, end)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        plan: Plan = kv_cache_spec.plan
        limit = min(max_length // plan.block, len(block_hashes))
        per_boundary = plan.boundary // plan.block
        known: dict[int, Any] = {}

        def cached(i: int) -> Any:
            if i not in known:
                known[i] = block_pool.get_cached_block(block_hashes[i], kv_cache_group_ids)
            return known[i]

        # A hit need not be one for fewer tokens: a state needs the sink and its own raw blocks, not those of earlier
        # partitions. vLLM asks again at every step that a request waits, so what cannot be a hit is found out early:
        # every state needs the first block, and the last one before its boundary.
        if limit and cached(0):
            for k in range(limit // per_boundary, -1, -1):
                low, begin = plan.raw_from(k), k * per_boundary
                sink = plan.sink_blocks if low else 0
                needed = [*range(begin - 1, low - 1, -1), *range(sink)]
                if not all(cached(i) for i in needed):
                    continue
                # A hit of k + 1 boundaries would be in state k + 1.
                end = max(begin, low)
                while end < min(limit, begin + per_boundary - 1) and cached(end):
                    end += 1
                null = block_pool.null_block
                tables = tuple(
                    [cached(i)[group] if i < sink or i >= low else null for i in range(end)]
                    for group in range(len(kv_cache_group_ids))
                )
                return tables, end * plan.block
        return tuple([] for _ in kv_cache_group_ids), 0


class LagKVCompressedManager(LagKVManager):
    GROUP = 1

    def __init__(self, kv_cache_spec: LagKVCompressedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._hashed_states: dict[
            str, int
        ] = {}  # of running requests: the last boundary whose blocks have keys

    def table_length(self, tokens: int) -> int:
        return self.entries(tokens // self.plan.boundary)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        # Kept blocks serve every later state, a mixed block its own alone.
        plan = self.plan
        table = self.req_to_blocks.get(request_id)
        if not plan.part or not table:
            return
        for k in range(processed_computed_tokens // plan.boundary - 1, plan.first - 1, -1):
            index = plan.mixed_index(k)
            if index < len(table):
                if table[index].is_null:
                    break
                self._remove_blocks_in_range(request_id, index, index + 1)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        request_id, plan = request.request_id, self.plan
        table = self.req_to_blocks[request_id]
        self.num_cached_block[request_id] = len(table)
        if not self.enable_caching:
            return
        done, now = self._hashed_states.get(request_id, 0), num_tokens // plan.boundary
        if now == done:
            return  # as in nearly every step
        for k in range(done + 1, now + 1):
            for index, key in self._keys(self.kv_cache_spec, k, request.block_hashes, self.kv_cache_group_id):
                block = table[index]
                if not block.is_null and block.block_hash is None:
                    self.block_pool._insert_block_hash(key, block, num_tokens=k * plan.boundary)
        self._hashed_states[request_id] = max(now, done)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._hashed_states.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @staticmethod
    def _keys(spec: Any, k: int, block_hashes: Any, group: int) -> Iterator[tuple[int, Any]]:
        """``(entry of the table, key)`` of the blocks that boundary ``k`` appends."""
        plan: Plan = spec.plan
        settings = repr(spec.settings).encode()

        def key(last_block: int, place: bytes) -> Any:
            return make_block_hash_with_group_id(block_hashes[last_block] + place + settings, group)

        for i in range(plan.m(k - 1) * plan.kept_blocks, plan.m(k) * plan.kept_blocks):
            partition, place = divmod(i, plan.kept_blocks)
            reference_end = plan.sink + (partition + 2) * plan.lag
            yield plan.kept_index(i), key(-(-reference_end // plan.block) - 1, b"kept %d" % place)
        if plan.part and k >= plan.first:
            yield plan.mixed_index(k), key((plan.sink + plan.m(k) * plan.lag) // plan.block, b"mixed")

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        plan: Plan = kv_cache_spec.plan
        tables: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        best: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        best_k = 0
        limit = min(max_length // plan.block, len(block_hashes)) * plan.block
        k = 1
        while k * plan.boundary <= limit:
            has_mixed = plan.part and k >= plan.first
            mixed = plan.mixed_index(k) if has_mixed else -1
            found = [
                {
                    index: block_pool.cached_block_hash_to_block.get_one_block(key)
                    for index, key in cls._keys(kv_cache_spec, k, block_hashes, group)
                }
                for group in kv_cache_group_ids
            ]
            if any(blocks[index] is None for blocks in found for index in blocks if index != mixed):
                break
            # Kept blocks serve every later state; the mixed block is needed in this state alone.
            for table, blocks in zip(tables, found, strict=True):
                table.extend([block_pool.null_block] * (plan.entries(k) - len(table)))
                for index, block in blocks.items():
                    if index != mixed:
                        table[index] = block
            if not has_mixed:
                best, best_k = tuple(list(table) for table in tables), k
            elif all(blocks[mixed] is not None for blocks in found):
                best, best_k = tuple(list(table) for table in tables), k
                for table, blocks in zip(best, found, strict=True):
                    table[mixed] = blocks[mixed]
            k += 1
        if limit >= (best_k + 1) * plan.boundary:
            limit = (best_k + 1) * plan.boundary - plan.block
        return best, limit


_warned = False


def _warn_of_request_settings(request: Any) -> None:
    """vLLM's hooks know no request where blocks are allocated and tables built, so a request has no say."""
    global _warned
    extra = getattr(request.sampling_params, "extra_args", None)
    if not _warned and isinstance(extra, dict) and KEY in extra:
        _warned = True
        logger.warning(
            "lagkv: request %s has extra_args[%r] = %r, which has no effect: vLLM gives every request of a server the "
            "same kind of cache. Send such requests to a deployment without the setting.",
            request.request_id,
            KEY,
            extra[KEY],
        )


def register_specs() -> None:
    """Tell vLLM which manager serves which spec; again where that was done already."""
    # The built-in specs are filled in only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    for spec, manager in ((LagKVRawSpec, LagKVRawManager), (LagKVCompressedSpec, LagKVCompressedManager)):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
