#include "ragged_bindings.h"

SIMT_BINDINGS(ragged_float16, module) { lagkv_simt::bind_ragged<__half>(module, "ragged_float16"); }
