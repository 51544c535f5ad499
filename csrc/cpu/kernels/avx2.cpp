// The CPU kernels for AVX2 with FMA and F16C.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "../kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the includes: their inline functions must stay runnable on any machine.
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

#define LAGKV_ISA avx2
#define LAGKV_VECTOR_BYTES 32
// In this order: each builds on the ones before it.
#include "../vec/vec.h"

#include "../vec/avx2.h"

#include "all.h"

#endif
