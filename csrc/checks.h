// Argument checks of the operators, shared by the backends. Every message says which argument, what it must
// be and what it got. lagkv_ext/checks.py has the same checks for tracing; tests hold the two to the same
// texts.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "overlap.h"
#include "params.h"

namespace lagkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "lagkv::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

/// Parts of messages, as Python spells them: made into text with the message and not before, so that a call
/// with nothing wrong does not pay for words.
struct ShapeText {
  const Tensor& x;
};
struct DtypeText {
  const Tensor& x;
};
struct DeviceText {
  const Tensor& x;
};

inline ShapeText shape_text(const Tensor& x) { return {x}; }
inline DtypeText dtype_text(const Tensor& x) { return {x}; }
inline DeviceText device_text(const Tensor& x) { return {x}; }

inline std::ostream& operator<<(std::ostream& out, ShapeText shape) {
  out << "[";
  for (int64_t dim = 0; dim < shape.x.dim(); ++dim) out << (dim ? ", " : "") << shape.x.size(dim);
  return out << "]";
}

inline std::ostream& operator<<(std::ostream& out, DtypeText dtype) {
  switch (dtype.x.scalar_type()) {
    case ScalarType::Half: return out << "float16";
    case ScalarType::BFloat16: return out << "bfloat16";
    case ScalarType::Float: return out << "float32";
    case ScalarType::Double: return out << "float64";
    case ScalarType::Bool: return out << "bool";
    case ScalarType::Byte: return out << "uint8";
    case ScalarType::Char: return out << "int8";
    case ScalarType::Short: return out << "int16";
    case ScalarType::Int: return out << "int32";
    case ScalarType::Long: return out << "int64";
    case ScalarType::Float8_e4m3fn: return out << "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return out << "float8_e5m2";
    case ScalarType::ComplexFloat: return out << "complex64";
    case ScalarType::ComplexDouble: return out << "complex128";
    default: return out << "scalar type " << static_cast<int>(dtype.x.scalar_type());
  }
}

inline std::ostream& operator<<(std::ostream& out, DeviceText device) {
  if (device.x.is_cpu()) return out << "cpu";
  if (device.x.is_cuda()) {
    out << "cuda";
  } else {
    out << "device type " << static_cast<int>(device.x.device().type());
  }
  return out << ":" << device.x.get_device_index();
}

inline bool is_floating(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

inline void check_dtype(const char* op, const char* name, const Tensor& x) {
  check(is_floating(x), op, name, " must be float16, bfloat16, float32 or float64, got ", dtype_text(x));
}

/// The element address must be a multiple of the element size; slicing cannot break this, foreign memory can.
inline void check_aligned(const char* op, const char* name, const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  check(address % x.element_size() == 0, op, name, " must be aligned to its element size (", x.element_size(),
        " bytes), got address ", address);
}

inline void check_rows(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 4, op, name, " must have 4 dimensions [B, H, N, D], got shape ", shape_text(x));
  check_dtype(op, name, x);
  check(x.size(2) <= kMaxLength, op, name, " must have at most ", kMaxLength, " tokens, got ", x.size(2));
  check(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, op, name,
        " must have a contiguous last dimension (stride 1), got stride ", x.stride(3));
  check_aligned(op, name, x);
}

inline void check_pair(const char* op, const Tensor& key, const Tensor& value) {
  check_rows(op, "key", key);
  check_rows(op, "value", value);
  check(value.scalar_type() == key.scalar_type(), op, "value must have the dtype of key (", dtype_text(key),
        "), got ", dtype_text(value));
  check(value.device() == key.device(), op, "value must be on the device of key (", device_text(key),
        "), got ", device_text(value));
  static const char* const kDims[] = {"batch", "heads", "tokens"};
  for (int64_t dim = 0; dim < 3; ++dim) {
    check(value.size(dim) == key.size(dim), op, "value must agree with key in ", kDims[dim], " ",
          shape_text(key), ", got shape ", shape_text(value));
  }
}

inline void check_start(const char* op, int64_t start) {
  check(start >= 0, op, "start must be at least 0, got ", start);
}

inline void check_lag_size(const char* op, int64_t lag_size) {
  check(lag_size >= 1, op, "lag_size must be at least 1, got ", lag_size);
}

inline void check_keep(const char* op, int64_t keep, const char* bound_name, int64_t bound) {
  check(keep >= 1, op, "keep must be at least 1, got ", keep);
  check(keep <= bound, op, "keep must be at most ", bound_name, " (", bound, "), got ", keep);
}

inline Score check_scoring(const char* op, double value_weight, const std::string& score) {
  check(std::isfinite(value_weight), op, "value_weight must be finite, got ", value_weight);
  if (score == "std") return Score::kStd;
  check(score == "cosine", op, "score must be 'std' or 'cosine', got '", score, "'");
  return Score::kCosine;
}

struct StridesText {
  const Tensor& x;
};
inline std::ostream& operator<<(std::ostream& out, StridesText strides) {
  out << "[";
  for (int64_t dim = 0; dim < strides.x.dim(); ++dim) out << (dim ? ", " : "") << strides.x.stride(dim);
  return out << "]";
}

/// A tensor of an operator that writes some of its arguments.
struct Argument {
  const char* name;
  const Tensor& x;
  bool written;
};

/// What is written holds every element at one index, and shares no byte with another argument.
template <size_t kCount>
void check_overlap(const char* op, const Argument (&arguments)[kCount]) {
  std::optional<Footprint> footprints[kCount];
  for (size_t i = 0; i < kCount; ++i) {
    const Tensor& x = arguments[i].x;
    footprints[i].emplace(x.data_ptr(), x.element_size(), x.dim(), x.sizes().data(), x.strides().data());
    check(!arguments[i].written || !overlaps_itself(*footprints[i]), op, arguments[i].name,
          " must not overlap itself, got shape ", shape_text(x), " with strides ", StridesText{x});
  }
  for (size_t i = 1; i < kCount; ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (!arguments[i].written && !arguments[j].written) continue;
      const Tensor &x = arguments[i].x, &other = arguments[j].x;
      check(!overlap(*footprints[i], *footprints[j]), op, arguments[i].name, " must not overlap ",
            arguments[j].name, ", got addresses ",
            static_cast<int64_t>(footprints[i]->begin() - footprints[j]->begin()), " bytes apart, shapes ",
            shape_text(x), " and ", shape_text(other), ", strides ", StridesText{x}, " and ",
            StridesText{other});
    }
  }
}

inline Score check_compress(const char* op, const Tensor& key, const Tensor& value, int64_t start,
                            int64_t lag_size, int64_t keep, double value_weight, const std::string& score) {
  check_pair(op, key, value);
  check_start(op, start);
  check_lag_size(op, lag_size);
  check_keep(op, keep, "lag_size", lag_size);
  return check_scoring(op, value_weight, score);
}

inline Score check_compress_(const char* op, const Tensor& key, const Tensor& value, int64_t start,
                             int64_t lag_size, int64_t keep, double value_weight, const std::string& score) {
  const Score kind = check_compress(op, key, value, start, lag_size, keep, value_weight, score);
  check_overlap(op, {{"key", key, true}, {"value", value, true}});
  return kind;
}

inline void check_partition_bounds(const char* op, const Tensor& x, int64_t start, int64_t lag_size) {
  check_rows(op, "x", x);
  check_start(op, start);
  check_lag_size(op, lag_size);
}

inline Score check_lag_score(const char* op, const Tensor& key, const Tensor& value, int64_t start,
                             int64_t lag_size, double value_weight, const std::string& score) {
  check_pair(op, key, value);
  check_start(op, start);
  check_lag_size(op, lag_size);
  return check_scoring(op, value_weight, score);
}

inline void check_topk_index(const char* op, const Tensor& score, int64_t keep) {
  check(score.dim() >= 1, op, "score must have at least 1 dimension [..., L], got a scalar");
  check_dtype(op, "score", score);
  const int64_t last = score.dim() - 1;
  check(score.size(last) <= kMaxLength, op, "score must have at most ", kMaxLength, " columns, got ",
        score.size(last));
  check_keep(op, keep, "the last dimension of score", score.size(last));
  check(score.stride(last) == 1 || score.size(last) <= 1 || score.numel() == 0, op,
        "score must have a contiguous last dimension (stride 1), got stride ", score.stride(last));
  check_aligned(op, "score", score);
}

/// All but the values of index, which only a backend that can read them can check.
inline void check_compact(const char* op, const Tensor& x, const Tensor& index) {
  check_rows(op, "x", x);
  check(index.dim() == 3, op, "index must have 3 dimensions [B, H, K], got shape ", shape_text(index));
  check(index.scalar_type() == ScalarType::Int, op, "index must be int32, got ", dtype_text(index));
  check(index.device() == x.device(), op, "index must be on the device of x (", device_text(x), "), got ",
        device_text(index));
  check(index.size(0) == x.size(0) && index.size(1) == x.size(1), op,
        "index must agree with x in batch and heads ", shape_text(x), ", got shape ", shape_text(index));
  check(index.size(2) <= kMaxLength, op, "index must have at most ", kMaxLength, " columns, got ",
        index.size(2));
}

}  // namespace lagkv
