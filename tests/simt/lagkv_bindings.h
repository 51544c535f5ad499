// The six operators on the executor, for one storage type: the launch code of csrc/cuda with
// `session.launch` for <<<>>>. Every bind_lagkv_*.cpp instantiates it once; tests/simt/operators.py gives
// the operators their signatures.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/staged.h"
#include "ragged_tensors.h"
#include "session.h"

namespace lagkv_simt {

namespace py = pybind11;
using lagkv::Score;
using lagkv::cuda::Device;
using lagkv::cuda::RealOf;
using simt::Session;
using simt::TensorArg;

/// A tensor of the session as csrc/ asks for it, at the kernels' address.
class Bound {
 public:
  Bound(const void* data, const TensorArg& tensor)
      : data_(tensor.numel() == 0 ? nullptr : const_cast<void*>(data)), tensor_(tensor) {}

  /// As in torch, a tensor of no elements has no memory.
  void* data_ptr() const { return data_; }
  const std::vector<int64_t>& sizes() const { return tensor_.shape; }
  const std::vector<int64_t>& strides() const { return tensor_.strides; }
  int64_t size(int64_t dim) const { return tensor_.shape[dim]; }

 private:
  void* data_;
  const TensorArg& tensor_;
};

template <class T>
Bound bound_in(Session& session, const char* name, const TensorArg& tensor) {
  return {session.in<T>(name, tensor), tensor};
}
template <class T>
Bound bound_out(Session& session, const char* name, const TensorArg& tensor) {
  return {session.out<T>(name, tensor), tensor};
}
template <class T>
Bound bound_inout(Session& session, const char* name, const TensorArg& tensor) {
  return {session.inout<T>(name, tensor), tensor};
}

template <class T>
lagkv::Rows<const T> rows_in(Session& session, const char* name, const TensorArg& tensor) {
  return lagkv::slot_rows<const T>(bound_in<T>(session, name, tensor));
}
template <class T>
lagkv::Rows<T> rows_out(Session& session, const char* name, const TensorArg& tensor) {
  return lagkv::slot_rows<T>(bound_out<T>(session, name, tensor));
}

/// Called by the launch code for every kernel. The launcher on a device asks for no more shared memory than
/// every launch gets (no cudaFuncSetAttribute), of which static shared memory is a part.
struct Run {
  Session& session;
  const char* name;
  const Device& device;

  template <class Params>
  void operator()(void (*kernel)(Params), int64_t grid, int threads, int64_t shared_bytes,
                  const std::remove_const_t<Params>& params) const {
    session.launch(name, kernel, dim3(static_cast<unsigned>(grid)), dim3(threads), shared_bytes, params);
    // Tests give devices less to send a plan into scratch; what is not planned keeps to what every device
    // has.
    const int64_t limit = std::max(device.shared_per_block, Device().shared_per_block);
    const auto& done = session.launches().back();
    const uint64_t shared = done.dynamic_shared_bytes + done.static_shared_bytes;
    if (shared > static_cast<uint64_t>(limit)) {
      throw std::runtime_error("simt: " + std::string(name) + " has " + std::to_string(shared) +
                               " bytes of shared memory, a block of this device " + std::to_string(limit));
    }
  }
};

struct Sizes {
  int64_t start, lag_size, keep;
  double value_weight;
  std::string score;
  int64_t smooth;
  std::string budget;
  int64_t sink_size;
};

inline lagkv::Method method_of(const Sizes& sizes) {
  return {sizes.value_weight,
          sizes.score == "blend"    ? Score::kBlend
          : sizes.score == "cosine" ? Score::kCosine
                                    : Score::kStd,
          sizes.smooth, sizes.budget == "head" ? lagkv::Budget::kHead : lagkv::Budget::kPartition};
}

/// Device memory of a call, one allocation after the other.
struct Scratch {
  Session& session;
  int count = 0;

  void* operator()(int64_t bytes) {
    return session.scratch<unsigned char>("scratch " + std::to_string(count++), bytes);
  }
};

template <class T>
lagkv::CompressParams<T> params_of(const lagkv::Rows<const T>& key, const lagkv::Rows<const T>& value,
                                   const TensorArg& shape, const Sizes& sizes) {
  lagkv::CompressParams<T> args{};
  args.key = key;
  args.value = value;
  args.batch = shape.shape[0];
  args.heads = shape.shape[1];
  args.length = shape.shape[2];
  args.start = sizes.start;
  args.lag_size = sizes.lag_size;
  args.keep = sizes.keep;
  args.method = method_of(sizes);
  return args;
}

template <class T>
auto score_rows(Session& session, Scratch& scratch, const Device& device) {
  return [&](const lagkv::CompressParams<T>& args, const lagkv::cuda::ScoreTarget<RealOf<T>>& score) {
    lagkv::cuda::launch_compress<T>(
        args, score, device, [&](int64_t bytes) { return scratch(bytes); },
        Run{session, "compress_kernel", device});
  };
}

/// compress, compress_carried and compress_, as ops.cu has them.
template <class T>
void launch(Session& session, const lagkv::CompressParams<T>& args, bool in_place, const Device& device) {
  Scratch scratch{session};
  const auto score = score_rows<T>(session, scratch, device);
  const auto memory = [&](int64_t bytes) { return scratch(bytes); };
  const int64_t rows = lagkv::output_length(args.length, args.start, args.lag_size, args.keep);
  if (lagkv::cuda::is_staged(args)) {
    return lagkv::cuda::launch_staged(args, in_place, device, memory, Run{session, "staged", device}, score);
  }
  auto first = args;
  if (in_place) first.key_out = first.value_out = {};
  score(first, {});
  if (!in_place || rows == args.length) return;
  lagkv::cuda::launch_move(args.key_out, args.value_out, args.index, args.batch, args.heads, args.start, rows,
                           device, Run{session, "move_kernel", device});
}

template <class T>
void bind(py::module_& parent, const char* dtype) {
  py::module_ module = parent.def_submodule(dtype);
  const auto out_of_place = [](Session& session, const TensorArg& key, const TensorArg& value,
                               const TensorArg& new_key, const TensorArg& new_value, const TensorArg& index,
                               const Sizes& sizes) {
    auto args =
        params_of<T>(rows_in<T>(session, "key", key), rows_in<T>(session, "value", value), key, sizes);
    args.key_out = rows_out<T>(session, "new_key", new_key);
    args.value_out = rows_out<T>(session, "new_value", new_value);
    args.index = session.out<int32_t>("index", index);
    return args;
  };
  module.def("compress", [out_of_place](Session& session, const TensorArg& key, const TensorArg& value,
                                        const TensorArg& new_key, const TensorArg& new_value,
                                        const TensorArg& index, const Sizes& sizes, const Device& device) {
    launch<T>(session, out_of_place(session, key, value, new_key, new_value, index, sizes), false, device);
  });
  module.def(
      "compress_carried",
      [out_of_place](Session& session, const TensorArg& key, const TensorArg& value, const TensorArg& carried,
                     const TensorArg& new_key, const TensorArg& new_value, const TensorArg& index,
                     const TensorArg& new_carried, const Sizes& sizes, const Device& device) {
        using Real = RealOf<T>;
        auto args = out_of_place(session, key, value, new_key, new_value, index, sizes);
        const int64_t sink = sizes.start - carried.shape[2];
        args.carried = {true, sink, sink,
                        lagkv::number_rows<const Real>(bound_in<Real>(session, "carried", carried)),
                        lagkv::number_rows<Real>(bound_out<Real>(session, "new_carried", new_carried))};
        launch<T>(session, args, false, device);
      });
  // Scores of no elements: none are given.
  module.def(
      "compress_", [](Session& session, const TensorArg& key, const TensorArg& value, const TensorArg& scores,
                      const TensorArg& index, const Sizes& sizes, const Device& device) {
        const auto key_rows = lagkv::slot_rows<T>(bound_inout<T>(session, "key", key));
        const auto value_rows = lagkv::slot_rows<T>(bound_inout<T>(session, "value", value));
        auto args = params_of<T>(key_rows.readable(), value_rows.readable(), key, sizes);
        args.key_out = key_rows;
        args.value_out = value_rows;
        args.index = session.out<int32_t>("index", index);
        if (scores.numel() > 0) {
          args.carried =
              lagkv::slot_scores<T>(bound_inout<RealOf<T>>(session, "scores", scores), sizes.sink_size);
        }
        launch<T>(session, args, true, device);
      });
  module.def("lag_score", [](Session& session, const TensorArg& key, const TensorArg& value,
                             const TensorArg& score, const Sizes& sizes, const Device& device) {
    const auto args =
        params_of<T>(rows_in<T>(session, "key", key), rows_in<T>(session, "value", value), key, sizes);
    Scratch scratch{session};
    auto* const to = session.out<RealOf<T>>("score", score);
    score_rows<T>(session, scratch, device)(args, {to, score.shape[2] * score.shape[3]});
  });
  module.def("partition_bounds", [](Session& session, const TensorArg& x, const TensorArg& bounds,
                                    int64_t start, int64_t lag_size, const Device& device) {
    const lagkv::BoundsParams<T, RealOf<T>> args{rows_in<T>(session, "x", x),
                                                 session.out<RealOf<T>>("bounds", bounds),
                                                 x.shape[0],
                                                 x.shape[1],
                                                 x.shape[2],
                                                 start,
                                                 lag_size};
    lagkv::cuda::launch_bounds<T>(args, Run{session, "bounds_kernel", device});
  });
  // False where the leading dimensions do not merge to kScoreDims: then the caller merges them by a copy.
  module.def("topk_index", [](Session& session, const TensorArg& score, const TensorArg& index, int64_t keep,
                              const Device& device) {
    lagkv::ScoreRows places;
    const size_t leading = score.shape.size() - 1;
    if (!lagkv::merge_rows(score.shape.data(), score.strides.data(), leading, places)) return false;
    const lagkv::TopkParams<T> args{
        session.in<T>("score", score), places, session.out<int32_t>("index", index), index.numel() / keep,
        score.shape[leading],          keep};
    lagkv::cuda::launch_topk<T>(args, device, Run{session, "topk_kernel", device});
    return true;
  });
  module.def("compact", [](Session& session, const TensorArg& x, const TensorArg& index, const TensorArg& out,
                           const Device& device) {
    const lagkv::CompactParams<T> args{
        rows_in<T>(session, "x", x),
        rows_out<T>(session, "out", out),
        lagkv::number_rows<const int32_t>(bound_in<int32_t>(session, "index", index)),
        x.shape[0],
        x.shape[1],
        x.shape[2],
        index.shape[2]};
    lagkv::cuda::launch_compact(args, Run{session, "compact_kernel", device});
  });
}

}  // namespace lagkv_simt
