// The CPU kernels for AVX-512.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "../kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the includes: their inline functions must stay runnable on any machine.
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")

// GCC 12 takes the deliberately undefined operand inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define LAGKV_ISA avx512
#define LAGKV_VECTOR_BYTES 64
// In this order: each builds on the ones before it.
#include "../vec/vec.h"

#include "../vec/avx512.h"

#include "all.h"

#endif
