// The ragged operators and compress_blocks on the executor, for one storage type, as lagkv_bindings.h has the
// others.
#pragma once

#include "cuda/launch.h"
#include "lagkv_bindings.h"
#include "ragged_tensors.h"

namespace lagkv_simt {

template <class T>
void run_ragged(Session& session, const lagkv::RaggedParams<T>& args, bool in_place, const Device& device) {
  int count = 0;
  const auto scratch = [&](int64_t bytes) {
    return session.scratch<unsigned char>("scratch " + std::to_string(count++), bytes);
  };
  const auto table =
      lagkv::cuda::make_table(args.batch, [&](int64_t bytes) -> void* { return scratch(bytes); });
  lagkv::cuda::launch_ragged<T>(args, table, device, scratch, Run{session, "ragged_kernel", device});
  if (in_place) {
    lagkv::cuda::launch_ragged_move(args, table, device, Run{session, "ragged_move_kernel", device});
  }
}

template <class T>
void bind_ragged(py::module_& parent, const char* dtype) {
  py::module_ module = parent.def_submodule(dtype);
  module.def("compress_ragged_", [](Session& session, const TensorArg& key, const TensorArg& value,
                                    const TensorArg& start, const TensorArg& length, const TensorArg& index,
                                    const Sizes& sizes, const Device& device) {
    run_ragged(
        session,
        lagkv::slot_params<T>(
            bound_inout<T>(session, "key", key), bound_inout<T>(session, "value", value),
            bound_inout<int32_t>(session, "start", start), bound_inout<int32_t>(session, "length", length),
            bound_out<int32_t>(session, "index", index), sizes.lag_size, sizes.keep, method_of(sizes)),
        true, device);
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
  module.def("compress_paged_",
             [](Session& session, const TensorArg& key_cache, const TensorArg& value_cache,
                const TensorArg& block_table, const TensorArg& start, const TensorArg& length,
                const TensorArg& index, const Sizes& sizes, const Device& device) {
               run_ragged(session,
                          lagkv::page_params<T>(bound_inout<T>(session, "key_cache", key_cache),
                                                bound_inout<T>(session, "value_cache", value_cache),
                                                bound_in<int32_t>(session, "block_table", block_table),
                                                bound_inout<int32_t>(session, "start", start),
                                                bound_inout<int32_t>(session, "length", length),
                                                bound_out<int32_t>(session, "index", index), sizes.lag_size,
                                                sizes.keep, method_of(sizes)),
                          true, device);
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
