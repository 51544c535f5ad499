// The six operators on the executor, for one storage type: the launch code of csrc/cuda with
// `session.launch` for <<<>>>. Every bind_lagkv_*.cpp instantiates it once; tests/simt/operators.py gives
// the operators their signatures.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launches.h"
#include "cuda/view.h"
#include "session.h"

namespace lagkv_simt {

namespace py = pybind11;
using lagkv::Score;
using lagkv::cuda::Device;
using lagkv::cuda::RealOf;
using lagkv::cuda::View;
using simt::Session;
using simt::TensorArg;

/// A tensor of at most 4 dimensions, its memory already known to the session. As in torch, one of no
/// elements has no memory.
inline View view_of(const void* data, const TensorArg& tensor) {
  View view;
  view.data = tensor.numel() == 0 ? nullptr : const_cast<void*>(data);
  for (size_t dim = 0; dim < tensor.shape.size(); ++dim) {
    view.size[dim] = tensor.shape[dim];
    view.stride[dim] = tensor.strides[dim];
  }
  return view;
}

template <class T>
auto rows_in(Session& session, const char* name, const TensorArg& tensor) {
  return view_of(session.in<T>(name, tensor), tensor).template rows<const T>();
}

/// What the launch code calls for every kernel. The launcher on a device asks for no more shared memory than
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
};

template <class T>
lagkv::CompressParams<T> params_of(const lagkv::StridedRows<const T>& key,
                                   const lagkv::StridedRows<const T>& value, const TensorArg& shape,
                                   const Sizes& sizes) {
  lagkv::CompressParams<T> args{};
  args.key = key;
  args.value = value;
  args.batch = shape.shape[0];
  args.heads = shape.shape[1];
  args.length = shape.shape[2];
  args.start = sizes.start;
  args.lag_size = sizes.lag_size;
  args.keep = sizes.keep;
  args.value_weight = sizes.value_weight;
  args.score = sizes.score == "cosine" ? Score::kCosine : Score::kStd;
  return args;
}

template <class T>
void launch(Session& session, const lagkv::CompressParams<T>& args, RealOf<T>* score, const Device& device) {
  lagkv::cuda::launch_compress<T>(
      args, score, device, [&](int64_t bytes) { return session.scratch<unsigned char>("scratch", bytes); },
      Run{session, "compress_kernel", device});
}

template <class T>
void bind(py::module_& parent, const char* dtype) {
  py::module_ module = parent.def_submodule(dtype);
  module.def("compress", [](Session& session, const TensorArg& key, const TensorArg& value,
                            const TensorArg& new_key, const TensorArg& new_value, const TensorArg& index,
                            const Sizes& sizes, const Device& device) {
    auto args =
        params_of<T>(rows_in<T>(session, "key", key), rows_in<T>(session, "value", value), key, sizes);
    args.key_out = view_of(session.out<T>("new_key", new_key), new_key).template rows<T>();
    args.value_out = view_of(session.out<T>("new_value", new_value), new_value).template rows<T>();
    args.index = session.out<int32_t>("index", index);
    launch<T>(session, args, nullptr, device);
  });
  module.def("compress_", [](Session& session, const TensorArg& key, const TensorArg& value,
                             const TensorArg& index, const Sizes& sizes, const Device& device) {
    const auto key_rows = view_of(session.inout<T>("key", key), key).template rows<T>();
    const auto value_rows = view_of(session.inout<T>("value", value), value).template rows<T>();
    const auto readable = [](const lagkv::StridedRows<T>& rows) {
      return lagkv::StridedRows<const T>{rows.data, rows.batch_stride, rows.head_stride, rows.row_stride,
                                         rows.dim};
    };
    auto args = params_of<T>(readable(key_rows), readable(value_rows), key, sizes);
    args.index = session.out<int32_t>("index", index);
    launch<T>(session, args, nullptr, device);
    const int64_t rows = index.shape[2];
    if (rows == key.shape[2]) return;
    lagkv::cuda::launch_move(key_rows, value_rows, args.index, args.batch, args.heads, args.start, rows,
                             device, Run{session, "move_kernel", device});
  });
  module.def("lag_score", [](Session& session, const TensorArg& key, const TensorArg& value,
                             const TensorArg& score, const Sizes& sizes, const Device& device) {
    const auto args =
        params_of<T>(rows_in<T>(session, "key", key), rows_in<T>(session, "value", value), key, sizes);
    launch<T>(session, args, session.out<RealOf<T>>("score", score), device);
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
    lagkv::cuda::launch_bounds<T>(args, device, Run{session, "bounds_kernel", device});
  });
  // False where the leading dimensions do not merge to kTopkDims: then the caller merges them by a copy.
  module.def("topk_index", [](Session& session, const TensorArg& score, const TensorArg& index, int64_t keep,
                              const Device& device) {
    lagkv::cuda::ScoreRows rows;
    const size_t leading = score.shape.size() - 1;
    if (!lagkv::cuda::merge_rows(score.shape.data(), score.strides.data(), leading, rows)) return false;
    const lagkv::TopkParams<T> args{
        session.in<T>("score", score), 0,   session.out<int32_t>("index", index), index.numel() / keep,
        score.shape[leading],          keep};
    lagkv::cuda::launch_topk<T>(args, rows, device, Run{session, "topk_kernel", device});
    return true;
  });
  module.def("compact", [](Session& session, const TensorArg& x, const TensorArg& index, const TensorArg& out,
                           const Device& device) {
    View places = view_of(session.in<int32_t>("index", index), index);
    places.size[3] = 1;
    const lagkv::CompactParams<T> args{rows_in<T>(session, "x", x),
                                       view_of(session.out<T>("out", out), out).template rows<T>(),
                                       places.rows<const int32_t>(),
                                       x.shape[0],
                                       x.shape[1],
                                       x.shape[2],
                                       index.shape[2]};
    lagkv::cuda::launch_compact(args, device, Run{session, "compact_kernel", device});
  });
}

}  // namespace lagkv_simt
