// The CPU kernels for the baseline of any machine.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../isa.h"
#include "../kernel_set.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LAGKV_ISA portable
#define LAGKV_VECTOR_BYTES 16
// In this order: each builds on the ones before it.
#include "../vec/vec.h"

#include "../vec/portable.h"

#include "all.h"
