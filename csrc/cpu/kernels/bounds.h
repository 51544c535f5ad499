// Per-channel minimum and maximum of a tile: lo_c = min_t x[t, c], hi_c = max_t x[t, c], NaN where a channel
// holds one.

namespace lagkv::cpu::LAGKV_ISA {

constexpr int kBoundsRows = 8;

/// For a tile that holds a NaN, which is rare: channel by channel, as torch.amin and torch.amax do.
template <class T>
__attribute__((noinline)) void bounds_exact(const Tile<T>& tile, RealOf<T>* lo, RealOf<T>* hi) {
  using Real = RealOf<T>;
  for (int64_t c = 0; c < tile.dim; ++c) lo[c] = hi[c] = to_real(tile.rows[c]);
  for (int64_t t = 1; t < tile.count; ++t) {
    const T* row = tile.rows + t * tile.row_stride;
    for (int64_t c = 0; c < tile.dim; ++c) {
      const Real x = to_real(row[c]);
      lo[c] = x < lo[c] || x != x ? x : lo[c];  // a comparison with NaN is false, so a NaN is never replaced
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
    prefetch(tile.upcoming, first, kRows);
    const T* row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      row[r] = tile.rows + (first + r < tile.count ? first + r : tile.count - 1) * tile.row_stride;
    }
    const auto step = [&](int64_t c, const auto& read) {
      const Reg x0 = read(row[0] + c).reg[0], x1 = read(row[1] + c).reg[0];
      const Reg x2 = read(row[2] + c).reg[0], x3 = read(row[3] + c).reg[0];
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

/// float16 and bfloat16 compared by their bits (sign and magnitude), twice as many to a vector. Three
/// extremes of the bits give both bounds:
///     hi = the signed maximum if it is not negative, else (every value is negative) the unsigned minimum;
///     lo = the unsigned maximum if its sign bit is set (the most negative value), else the unsigned minimum.
/// A NaN lies beyond the infinity of its sign, so the extremes show a NaN, too.
template <class T, bool kBlocked>
void bounds_16bit(const Tile<T>& tile, float* lo, float* hi) {
  constexpr int width = kWidth<int16_t>, panel = 512;
  constexpr int16_t infinity = kInfinityBits<T>;

  int16_t greatest[panel], most[panel], least[panel];  // signed, unsigned, unsigned
  for (int64_t base = 0; base < tile.dim; base += panel) {
    const int64_t channels = tile.dim - base < panel ? tile.dim - base : panel;
    for (int64_t c = 0; c < channels; c += width) {
      store_raw(greatest + c, Int16Reg{} + -0x8000);
      store_raw(most + c, Int16Reg{});
      store_raw(least + c, Int16Reg{} + -1);
    }
    for (int64_t first = 0; first < tile.count; first += kBoundsRows) {
      if (base == 0) prefetch(tile.upcoming, first, kBoundsRows);
      const T* row[kBoundsRows];
#pragma GCC unroll 8
      for (int r = 0; r < kBoundsRows; ++r) {
        row[r] = tile.rows + (first + r < tile.count ? first + r : tile.count - 1) * tile.row_stride + base;
      }
      const auto step = [&](int64_t c, const auto& read) {
        Int16Reg high = load_raw<Int16Reg>(greatest + c);
        Int16Reg up = load_raw<Int16Reg>(most + c), down = load_raw<Int16Reg>(least + c);
#pragma GCC unroll 8
        for (int r = 0; r < kBoundsRows; ++r) {
          const Int16Reg x = read(row[r] + c);
          high = max_signed(x, high);
          up = max_unsigned(x, up);
          down = min_unsigned(x, down);
        }
        store_raw(greatest + c, high);
        store_raw(most + c, up);
        store_raw(least + c, down);
      };
      int64_t c = 0;
      for (; c + width <= channels; c += width) step(c, WholeBits());
      // The last vector overlaps the one before it: a minimum taken twice is the same minimum.
      if (c < channels && channels >= width) step(channels - width, WholeBits());
      if (channels < width) step(0, PartBits{channels});
    }
    for (int64_t c = channels; c % width != 0; ++c) greatest[c] = most[c] = least[c] = 0;
    constexpr int out_width = kWidth<float>;
    for (int64_t c = 0; c < channels; c += width) {
      const Int16Reg high = load_raw<Int16Reg>(greatest + c), up = load_raw<Int16Reg>(most + c);
      const Int16Reg down = load_raw<Int16Reg>(least + c);
      // A negative number beyond infinity is also the greater one as a signed integer.
      const Int16Reg negative_nan = (up < 0) & (up > static_cast<int16_t>(infinity | -0x8000));
      const Int16Reg all_ones = ((high > infinity) | negative_nan) & 0x7fff;
      T bits[2][width];
      store_raw(bits[0], (up < 0 ? up : down) | all_ones);
      store_raw(bits[1], (high < 0 ? down : high) | all_ones);
      for (int64_t i = 0; i < width && c + i < padded(channels); i += out_width) {
        if constexpr (kBlocked && kBlockRegs<T> == 2) {  // width is that of a block
          store(lo + base + c + i, Whole()(bits[0]).reg[i / out_width]);
          store(hi + base + c + i, Whole()(bits[1]).reg[i / out_width]);
        } else {
          store(lo + base + c + i, load(bits[0] + i));
          store(hi + base + c + i, load(bits[1] + i));
        }
      }
    }
  }
}

/// With kBlocked, bounds are in the order of blocks (read.h), else in the order of channels.
template <class T, bool kBlocked>
void bounds_in_order(const Tile<T>& tile, RealOf<T>* lo, RealOf<T>* hi) {
  if constexpr (kIs16Bit<T>) {
    bounds_16bit<T, kBlocked>(tile, lo, hi);
  } else {
    bounds_floating(tile, lo, hi);
  }
}

template <class T>
void bounds(const Tile<T>& tile, RealOf<T>* lo, RealOf<T>* hi) {
  bounds_in_order<T, false>(tile, lo, hi);
}

}  // namespace lagkv::cpu::LAGKV_ISA
