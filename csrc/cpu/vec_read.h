// How kernels read rows, on top of vec_<isa>.h.

namespace lagkv::cpu::LAGKV_ISA {

/// Vectors of a row that are summed before their sum joins that of the vectors before them: the error of a
/// long sum grows with the longer of the two, not with their product.
constexpr int64_t kPanel = 64;

/// How a step of a loop over channels reads a vector: whole, or the last channels of a row. (No lambdas: GCC
/// 12 settles the ABI of a lambda's vectors before it sees the target pragma.)
struct Whole {
  template <class T>
  auto operator()(const T* p) const {
    return load(p);
  }
  template <class Reg>
  Reg mask(Reg x) const {
    return x;
  }
};

template <class Real>
struct Part {
  int64_t count;
  typename LanesOf<Real>::IntReg valid;
  explicit Part(int64_t channels) : count(channels), valid(first_lanes<Real>(channels)) {}
  template <class T>
  RegOf<Real> operator()(const T* p) const {
    return load_part(p, count);
  }
  RegOf<Real> mask(RegOf<Real> x) const { return keep_lanes<Real>(x, valid); }
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
