// The CPU kernels for AVX2 with FMA and F16C.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the includes: their inline functions must stay runnable on any machine.
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

#define LAGKV_ISA avx2
#define LAGKV_VECTOR_BYTES 32
// In this order: each builds on the ones before it.
#include "vec.h"

#include "vec_avx2.h"

#include "kernels.h"

#endif
