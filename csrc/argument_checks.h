// Checks of single arguments: all that can be seen of a tensor without reading its elements.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "messages.h"
#include "overlap.h"

namespace lagkv {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();  // of a sequence: positions are int32

/// Names that an operator gives its keys and values and their dimensions.
struct RowsLayout {
  const char *key, *value;
  int64_t rank;
  const char* shape;
  const char* dims[3];  // all but the last
};

constexpr RowsLayout kDense = {"key", "value", 4, "[B, H, N, D]", {"batch", "heads", "tokens"}};
constexpr RowsLayout kSlots = {"key", "value", 4, "[B, H, capacity, D]", {"batch", "heads", "capacity"}};
constexpr RowsLayout kPacked = {"key", "value", 3, "[T, H, D]", {"rows", "heads", nullptr}};
constexpr RowsLayout kPages = {
    "key_cache", "value_cache", 4, "[blocks, block_size, H, D]", {"blocks", "block_size", "heads"}};

inline void check_dtype(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
            type == ScalarType::Double,
        op, name, " must be float16, bfloat16, float32 or float64, got ", DtypeText{x});
}

inline void check_int32(const char* op, const char* name, const Tensor& x) {
  check(x.scalar_type() == ScalarType::Int, op, name, " must be int32, got ", DtypeText{x});
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  const auto last = static_cast<size_t>(x.dim() - 1);
  const int64_t stride = x.strides()[last];
  check(stride == 1 || x.sizes()[last] <= 1 || x.numel() == 0, op, name,
        " must have a contiguous last dimension (stride 1), got stride ", stride);
}

/// The element address must be a multiple of the element size; slicing cannot break this, foreign memory can.
inline void check_aligned(const char* op, const char* name, const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  check(address % x.element_size() == 0, op, name, " must be aligned to its element size (", x.element_size(),
        " bytes), got address ", address);
}

inline void check_device(const char* op, const char* name, const Tensor& x, const char* of,
                         const Tensor& first) {
  check(x.device() == first.device(), op, name, " must be on the device of ", of, " (", DeviceText{first},
        "), got ", DeviceText{x});
}

inline void check_rows(const char* op, const RowsLayout& layout, const char* name, const Tensor& x) {
  check(x.dim() == layout.rank, op, name, " must have ", layout.rank, " dimensions ", layout.shape,
        ", got shape ", ShapeText{x});
  check_dtype(op, name, x);
  check_contiguous(op, name, x);
  check_aligned(op, name, x);
}

inline void check_agreement(const char* op, const RowsLayout& layout, const Tensor& key,
                            const Tensor& value) {
  check(value.scalar_type() == key.scalar_type(), op, layout.value, " must have the dtype of ", layout.key,
        " (", DtypeText{key}, "), got ", DtypeText{value});
  check_device(op, layout.value, value, layout.key, key);
  for (int64_t dim = 0; dim + 1 < layout.rank; ++dim) {
    check(value.size(dim) == key.size(dim), op, layout.value, " must agree with ", layout.key, " in ",
          layout.dims[dim], " ", ShapeText{key}, ", got shape ", ShapeText{value});
  }
}

inline void check_pair(const char* op, const RowsLayout& layout, const Tensor& key, const Tensor& value) {
  check_rows(op, layout, layout.key, key);
  check_rows(op, layout, layout.value, value);
  check_agreement(op, layout, key, value);
}

/// [B, H, N, D] of a dense operator, in which N is a number of tokens.
inline void check_dense(const char* op, const char* name, const Tensor& x) {
  check_rows(op, kDense, name, x);
  check(x.size(2) <= kMaxLength, op, name, " must have at most ", kMaxLength, " tokens, got ", x.size(2));
}

inline void check_dense_pair(const char* op, const Tensor& key, const Tensor& value) {
  check_dense(op, "key", key);
  check_dense(op, "value", value);
  check_agreement(op, kDense, key, value);
}

inline void check_start(const char* op, int64_t start) {
  check(start >= 0, op, "start must be at least 0, got ", start);
}

inline void check_lag_size(const char* op, int64_t lag_size) {
  check(lag_size >= 1, op, "lag_size must be at least 1, got ", lag_size);
}

inline void check_keep(const char* op, int64_t keep, const char* bound_name, int64_t bound,
                       int64_t least = 1) {
  check(keep >= least, op, "keep must be at least ", least, ", got ", keep);
  check(keep <= bound, op, "keep must be at most ", bound_name, " (", bound, "), got ", keep);
}

/// An argument of an operator that writes some of its arguments; null where it was not given.
struct Argument {
  const char* name;
  const Tensor* x;
  bool written;
};

inline const Tensor* given(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }

/// Refuses a written argument that holds an element at two indices or shares a byte with another one.
template <size_t kCount>
void check_overlap(const char* op, const Argument (&arguments)[kCount]) {
  std::optional<Footprint> footprints[kCount];
  for (size_t i = 0; i < kCount; ++i) {
    if (arguments[i].x == nullptr) continue;
    const Tensor& x = *arguments[i].x;
    footprints[i].emplace(x.data_ptr(), x.element_size(), x.dim(), x.sizes().data(), x.strides().data());
    check(!arguments[i].written || !overlaps_itself(*footprints[i]), op, arguments[i].name,
          " must not overlap itself, got shape ", ShapeText{x}, " with strides ", StridesText{x});
  }
  for (size_t i = 1; i < kCount; ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (!footprints[i] || !footprints[j] || (!arguments[i].written && !arguments[j].written)) continue;
      const Tensor &x = *arguments[i].x, &other = *arguments[j].x;
      check(!overlap(*footprints[i], *footprints[j]), op, arguments[i].name, " must not overlap ",
            arguments[j].name, ", got addresses ",
            static_cast<int64_t>(footprints[i]->begin() - footprints[j]->begin()), " bytes apart, shapes ",
            ShapeText{x}, " and ", ShapeText{other}, ", strides ", StridesText{x}, " and ",
            StridesText{other});
    }
  }
}

/// start, length, cu_seqlens: int32, contiguous, one number a sequence (or one more).
inline void check_numbers(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 1, op, name, " must have 1 dimension, got shape ", ShapeText{x});
  check_int32(op, name, x);
  check(x.stride(0) == 1 || x.size(0) <= 1, op, name, " must be contiguous, got stride ", x.stride(0));
}

inline void check_count(const char* op, const char* name, const Tensor& x, int64_t batch) {
  check(x.size(0) == batch, op, name, " must have one number for each of ", batch, " sequences, got shape ",
        ShapeText{x});
}

inline void check_start_and_length(const char* op, const Tensor& start, const Tensor& length, int64_t batch) {
  check_numbers(op, "start", start);
  check_count(op, "start", start, batch);
  check_numbers(op, "length", length);
  check_count(op, "length", length, batch);
}

inline void check_cu_seqlens_and_start(const char* op, const Tensor& cu_seqlens, const Tensor& start) {
  check_numbers(op, "cu_seqlens", cu_seqlens);
  check(cu_seqlens.size(0) >= 1, op, "cu_seqlens must have at least 1 number (B + 1 of them), got shape ",
        ShapeText{cu_seqlens});
  check_numbers(op, "start", start);
  check_count(op, "start", start, cu_seqlens.size(0) - 1);
}

inline void check_block_table(const char* op, const Tensor& block_table) {
  check(block_table.dim() == 2, op, "block_table must have 2 dimensions [B, max_blocks], got shape ",
        ShapeText{block_table});
  check_int32(op, "block_table", block_table);
  check_contiguous(op, "block_table", block_table);
}

/// Rows that a sequence can have.
inline void check_capacity(const char* op, int64_t capacity, const char* of) {
  check(capacity <= kMaxLength, op, of, " must come to at most ", kMaxLength, " tokens, got ", capacity);
}

}  // namespace lagkv
