// Reads rows in blocks of channels that fill one or two vectors of reals.

namespace lagkv::cpu::LAGKV_ISA {

/// bfloat16 comes in pairs of vectors, even channels and odd channels: with one shift and one mask they are
/// float32, where channels in their order would have to be spread first. Arrays over channels that only the
/// kernels see are kept in the order of these blocks. float16 comes in pairs where it is converted by hand.
template <class T>
constexpr int kBlockRegs = 1;
template <>
constexpr int kBlockRegs<BFloat16> = 2;
template <>
constexpr int kBlockRegs<Half> = kHalfPairs ? 2 : 1;

template <class T>
constexpr int kBlock = kBlockRegs<T> * kWidth<RealOf<T>>;

/// The place of a channel in an array of that order.
template <class T>
constexpr int64_t block_order(int64_t channel) {
  if (!std::is_same_v<T, BFloat16>) return channel;
  constexpr int64_t regs = kBlockRegs<T>, width = kWidth<RealOf<T>>;
  const int64_t within = channel % kBlock<T>;
  return channel - within + within % regs * width + within / regs;
}

/// Vectors of a row that are summed before their sum joins that of the vectors before them: the error of a
/// long sum grows with the longer of the two, not with their product.
constexpr int64_t kPanel = 64;

template <class T>
struct Block {
  RegOf<RealOf<T>> reg[kBlockRegs<T>];
};

inline Block<BFloat16> split_pairs(Int32Reg pairs) {
  return {{(FloatReg)(pairs << 16), (FloatReg)(pairs & static_cast<int32_t>(0xffff0000))}};
}

template <class T>
inline Block<T> split_halves(Int16Reg bits) {
  Block<T> block;
  convert_halves(bits, block.reg[0], block.reg[1]);
  return block;
}

/// A step of a loop over channels on a whole block. (No lambdas for vectors: GCC 12 settles the ABI of a
/// lambda's vectors before it sees the target pragma.)
struct Whole {
  template <class T>
  Block<T> operator()(const T* p) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return split_pairs(load_raw<Int32Reg>(p));
    } else if constexpr (kBlockRegs<T> == 2) {
      return split_halves<T>(load_raw<Int16Reg>(p));
    } else {
      return {{load(p)}};
    }
  }
  template <class Reg>
  Reg mask(Reg x, int) const {
    return x;
  }
};

/// The same on the last `count` channels of a row: zeros beyond them, and a mask for lanes that must be zero.
template <class T>
struct Part {
  using Real = RealOf<T>;
  int64_t count;
  typename LanesOf<Real>::IntReg valid[kBlockRegs<T>];
  explicit Part(int64_t channels) : count(channels) {
    for (int i = 0; i < kBlockRegs<T>; ++i) {
      // The number of these channels in vector i.
      const int64_t left = channels - i * kWidth<Real>;
      valid[i] = first_lanes<Real>(std::is_same_v<T, BFloat16> ? (channels + 1 - i) / 2
                                   : left > 0                  ? left
                                                               : 0);
    }
  }
  Block<T> operator()(const T* p) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return split_pairs((Int32Reg)load_part_bits(p, count));
    } else if constexpr (kBlockRegs<T> == 2) {
      return split_halves<T>(load_part_bits(p, count));
    } else {
      return {{load_part(p, count)}};
    }
  }
  RegOf<Real> mask(RegOf<Real> x, int reg) const { return keep_lanes<Real>(x, valid[reg]); }
};

struct WholeBits {
  template <class T>
  Int16Reg operator()(const T* p) const {
    return load_raw<Int16Reg>(p);
  }
};

struct PartBits {
  int64_t count;
  template <class T>
  Int16Reg operator()(const T* p) const {
    return load_part_bits(p, count);
  }
};

}  // namespace lagkv::cpu::LAGKV_ISA
