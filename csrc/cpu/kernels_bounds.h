// Per-channel minimum and maximum of a tile: lo_c = min_t x[t, c], hi_c = max_t x[t, c], NaN where a channel
// holds one.

namespace lagkv::cpu::LAGKV_ISA {

constexpr int kBoundsRows = 8;

/// The rare tile with a NaN in it: channel by channel, as torch.amin and torch.amax do.
template <class T>
__attribute__((noinline)) void bounds_exact(const Tile<T>& tile, RealOf<T>* lo, RealOf<T>* hi) {
  using Real = RealOf<T>;
  for (int64_t c = 0; c < tile.dim; ++c) lo[c] = hi[c] = to_real(tile.rows[c]);
  for (int64_t t = 1; t < tile.count; ++t) {
    const T* row = tile.rows + t * tile.row_stride;
    for (int64_t c = 0; c < tile.dim; ++c) {
      const Real x = to_real(row[c]);
      lo[c] = x < lo[c] || x != x ? x : lo[c];  // a comparison with NaN is false: a NaN, once in, stays
      hi[c] = x > hi[c] || x != x ? x : hi[c];
    }
  }
}

/// float32 and float64. Rows past the last one repeat it, which changes no bound.
template <class T>
void bounds_floating(const Tile<T>& tile, T* lo, T* hi) {
  using Reg = RegOf<T>;
  constexpr int kRows = 4, width = kWidth<T>;
  NanFlag nan;
  for (int64_t c = 0; c < tile.dim; c += width) {
    store(lo + c, set1<T>(__builtin_inf()));
    store(hi + c, set1<T>(-__builtin_inf()));
  }
  for (int64_t first = 0; first < tile.count; first += kRows) {
    const T* row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r] = tile.rows + (first + r < tile.count ? first + r : tile.count - 1) * tile.row_stride;
    }
    const auto step = [&](int64_t c, const auto& read) {
      const Reg x0 = read(row[0] + c), x1 = read(row[1] + c), x2 = read(row[2] + c), x3 = read(row[3] + c);
      nan.see(x0, x1);
      nan.see(x2, x3);
      store(lo + c, min(min(min(x0, x1), min(x2, x3)), load(lo + c)));
      store(hi + c, max(max(max(x0, x1), max(x2, x3)), load(hi + c)));
    };
    int64_t c = 0;
    for (; c + width <= tile.dim; c += width) step(c, Whole());
    if (c < tile.dim) step(c, Part<T>(tile.dim - c));
  }
  if (nan.any()) bounds_exact(tile, lo, hi);
}

/// The bits of a 16-bit number as an integer in the order of the numbers; its own inverse.
inline Int16Reg order(Int16Reg bits) { return bits ^ ((bits >> 15) & 0x7fff); }

/// float16 and bfloat16 as 16-bit integers in the order of the numbers, twice as many to a vector. A NaN lies
/// beyond the infinity of its sign, so the extremes themselves tell whether a channel has one.
template <class T>
void bounds_16bit(const Tile<T>& tile, float* lo, float* hi) {
  constexpr int width = kWidth<int16_t>, panel = 512;
  constexpr int16_t infinity = kInfinityBits<T>;

  int16_t low[panel], high[panel];
  for (int64_t base = 0; base < tile.dim; base += panel) {
    const int64_t channels = tile.dim - base < panel ? tile.dim - base : panel;
    for (int64_t c = 0; c < channels; c += width) {
      store_raw(low + c, Int16Reg{} + 0x7fff);
      store_raw(high + c, Int16Reg{} + -0x8000);
    }
    for (int64_t first = 0; first < tile.count; first += kBoundsRows) {
      const T* row[kBoundsRows];
#pragma GCC unroll 8
      for (int r = 0; r < kBoundsRows; ++r) {
        row[r] = tile.rows + (first + r < tile.count ? first + r : tile.count - 1) * tile.row_stride + base;
      }
      const auto step = [&](int64_t c, const auto& read) {
        Int16Reg least = load_raw<Int16Reg>(low + c), most = load_raw<Int16Reg>(high + c);
#pragma GCC unroll 8
        for (int r = 0; r < kBoundsRows; ++r) {
          const Int16Reg x = order(read(row[r] + c));
          least = x < least ? x : least;
          most = x > most ? x : most;
        }
        store_raw(low + c, least);
        store_raw(high + c, most);
      };
      int64_t c = 0;
      for (; c + width <= channels; c += width) step(c, WholeBits());
      // The last channels again together with some before them: a minimum taken twice is the same minimum.
      if (c < channels && channels >= width) step(channels - width, WholeBits());
      if (channels < width) step(0, PartBits{channels});
    }
    constexpr int out_width = kWidth<float>;
    for (int64_t c = 0; c < channels; c += width) {
      const Int16Reg least = load_raw<Int16Reg>(low + c), most = load_raw<Int16Reg>(high + c);
      const Int16Reg has_nan = (least < static_cast<int16_t>(-infinity - 1)) | (most > infinity);
      T bits[2][width];
      store_raw(bits[0], order(least) | (has_nan & 0x7fff));
      store_raw(bits[1], order(most) | (has_nan & 0x7fff));
      for (int64_t i = 0; i < width && c + i < padded(channels); i += out_width) {
        store(lo + base + c + i, load(bits[0] + i));
        store(hi + base + c + i, load(bits[1] + i));
      }
    }
  }
  for (int64_t c = tile.dim; c < padded(tile.dim); ++c) lo[c] = hi[c] = 0;
}

template <class T>
void bounds(const Tile<T>& tile, RealOf<T>* lo, RealOf<T>* hi) {
  if constexpr (kIs16Bit<T>) {
    bounds_16bit(tile, lo, hi);
  } else {
    bounds_floating(tile, lo, hi);
  }
}

}  // namespace lagkv::cpu::LAGKV_ISA
