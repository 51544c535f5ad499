// The ragged operators and compress_blocks on the executor, for one storage type, as lagkv_bindings.h has the
// others.
#pragma once

#include "lagkv_bindings.h"

namespace lagkv_simt {

template <class T>
void run_ragged(Session& session, const lagkv::RaggedParams<T>& args, bool in_place, const Device& device) {
  Scratch memory{session};
  const auto scratch = [&](int64_t bytes) { return memory(bytes); };
  const auto table = lagkv::cuda::make_table(args.batch, scratch);
  const auto score = [&](const lagkv::RaggedParams<T>& args, const lagkv::cuda::SequenceTable& table,
                         const lagkv::cuda::ScoreTarget<RealOf<T>>& target) {
    lagkv::cuda::launch_ragged<T>(args, table, target, device, scratch,
                                  Run{session, "ragged_kernel", device});
  };
  if (lagkv::cuda::is_staged(args)) {
    lagkv::cuda::launch_staged(args, table, device, scratch, Run{session, "staged", device}, score);
  } else {
    score(args, table, {});
  }
  if (in_place) {
    lagkv::cuda::launch_ragged_move(args, table, device, Run{session, "ragged_move_kernel", device});
  }
}

template <class T>
void bind_ragged(py::module_& parent, const char* dtype) {
  py::module_ module = parent.def_submodule(dtype);
  module.def("compress_ragged_", [](Session& session, const TensorArg& key, const TensorArg& value,
                                    const TensorArg& scores, const TensorArg& start, const TensorArg& length,
                                    const TensorArg& index, const Sizes& sizes, const Device& device) {
    auto args = lagkv::slot_params<T>(
        bound_inout<T>(session, "key", key), bound_inout<T>(session, "value", value),
        bound_inout<int32_t>(session, "start", start), bound_inout<int32_t>(session, "length", length),
        bound_out<int32_t>(session, "index", index), sizes.lag_size, sizes.keep, method_of(sizes));
    if (scores.numel() > 0) {
      args.carried =
          lagkv::slot_scores<T>(bound_inout<RealOf<T>>(session, "scores", scores), sizes.sink_size);
    }
    run_ragged(session, args, true, device);
  });
  module.def("compress_varlen", [](Session& session, const TensorArg& key, const TensorArg& value,
                                   const TensorArg& cu_seqlens, const TensorArg& start,
                                   const TensorArg& new_key, const TensorArg& new_value,
                                   const TensorArg& index, const TensorArg& new_cu_seqlens,
                                   const TensorArg& new_start, const Sizes& sizes, const Device& device) {
    run_ragged(session,
               lagkv::packed_params<T>(
                   bound_in<T>(session, "key", key), bound_in<T>(session, "value", value),
                   bound_in<int32_t>(session, "cu_seqlens", cu_seqlens),
                   bound_in<int32_t>(session, "start", start), bound_out<T>(session, "new_key", new_key),
                   bound_out<T>(session, "new_value", new_value), bound_out<int32_t>(session, "index", index),
                   bound_out<int32_t>(session, "new_cu_seqlens", new_cu_seqlens),
                   bound_out<int32_t>(session, "new_start", new_start), sizes.lag_size, sizes.keep,
                   method_of(sizes)),
               false, device);
  });
  module.def("compress_paged_", [](Session& session, const TensorArg& key_cache, const TensorArg& value_cache,
                                   const TensorArg& scores, const TensorArg& block_table,
                                   const TensorArg& start, const TensorArg& length, const TensorArg& index,
                                   const Sizes& sizes, const Device& device) {
    const Bound table = bound_in<int32_t>(session, "block_table", block_table);
    auto args = lagkv::page_params<T>(
        bound_inout<T>(session, "key_cache", key_cache), bound_inout<T>(session, "value_cache", value_cache),
        table, bound_inout<int32_t>(session, "start", start), bound_inout<int32_t>(session, "length", length),
        bound_out<int32_t>(session, "index", index), sizes.lag_size, sizes.keep, method_of(sizes));
    if (scores.numel() > 0) {
      args.carried =
          lagkv::page_scores<T>(bound_inout<RealOf<T>>(session, "scores", scores), table, sizes.sink_size);
    }
    run_ragged(session, args, true, device);
  });
  module.def("compress_blocks",
             [](Session& session, const TensorArg& key_cache, const TensorArg& value_cache,
                const TensorArg& source_table, const TensorArg& target_table, const TensorArg& m_before,
                const TensorArg& m_after, const TensorArg& index, const Sizes& sizes, const Device& device) {
               lagkv::cuda::launch_blocks<T>(
                   lagkv::block_params<T>(bound_inout<T>(session, "key_cache", key_cache),
                                          bound_inout<T>(session, "value_cache", value_cache),
                                          bound_in<int32_t>(session, "source_table", source_table),
                                          bound_in<int32_t>(session, "target_table", target_table),
                                          bound_in<int32_t>(session, "m_before", m_before),
                                          bound_in<int32_t>(session, "m_after", m_after),
                                          bound_out<int32_t>(session, "index", index), sizes.start,
                                          sizes.lag_size, sizes.keep, method_of(sizes)),
                   device, [&](int64_t bytes) { return session.scratch<unsigned char>("scratch", bytes); },
                   Run{session, "blocks_kernel", device});
             });
}

}  // namespace lagkv_simt
