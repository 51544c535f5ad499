#include "ragged_bindings.h"

SIMT_BINDINGS(ragged_bfloat16, module) { lagkv_simt::bind_ragged<__nv_bfloat16>(module, "ragged_bfloat16"); }
