// The kernels of one instruction set, put together. Included last by its source (portable.cpp, ...).

#include "../vec/read.h"

#include "bounds.h"

#include "cosine_statistic.h"
#include "gather.h"
#include "score.h"
#include "select.h"
#include "std_statistic.h"
// After the statistics that it puts together.
#include "blend_statistic.h"

namespace lagkv::cpu::LAGKV_ISA {

template <class T>
constexpr Kernels<T> make_kernels() {
  using Real = RealOf<T>;
  return {{std_reference<T>, std_statistic<T>, std_advance<T>, std_score<Real>},
          {cosine_reference<T>, cosine_statistic<T>, cosine_advance<T>, cosine_score<Real>},
          {blend_reference<T>, blend_statistic<T>, blend_advance<T>, blend_score<Real>},
          smooth<Real>,
          bounds<T>,
          select<Real>,
          restore<Real>,
          widen<T>,
          gather<T>,
          fence};
}

const KernelSet kernel_set = {make_kernels<Half>(), make_kernels<BFloat16>(), make_kernels<float>(),
                              make_kernels<double>()};

}  // namespace lagkv::cpu::LAGKV_ISA
