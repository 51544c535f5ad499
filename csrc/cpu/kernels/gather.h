// Copies selected rows, on request by streaming stores, which bypass the caches.

namespace lagkv::cpu::LAGKV_ISA {

/// Copies bytes between places that do not overlap; with kStream, `out` is aligned to a vector.
template <bool kStream>
inline void copy_bytes(const char* from, char* out, int64_t bytes) {
  constexpr int64_t width = LAGKV_VECTOR_BYTES;
  int64_t i = 0;
  for (; i + width <= bytes; i += width) {
    const Int32Reg x = load_raw<Int32Reg>(from + i);
    if constexpr (kStream) {
      stream_raw(out + i, x);
    } else {
      store_raw(out + i, x);
    }
  }
  if (i < bytes) __builtin_memcpy(out + i, from + i, static_cast<size_t>(bytes - i));
}

template <class T>
void gather(const T* rows, int64_t row_stride, const int32_t* index, int32_t base, int64_t count, int64_t dim,
            T* out, int64_t out_stride, bool stream) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(T));
  const int64_t out_bytes = out_stride * static_cast<int64_t>(sizeof(T));
  stream = stream &&
           (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(out_bytes)) % LAGKV_VECTOR_BYTES == 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* from = rows + (static_cast<int64_t>(index[i]) - base) * row_stride;
    T* to = out + i * out_stride;
    if (from == to) continue;
    if (stream) {
      copy_bytes<true>(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), bytes);
    } else {
      copy_bytes<false>(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), bytes);
    }
  }
}

}  // namespace lagkv::cpu::LAGKV_ISA
