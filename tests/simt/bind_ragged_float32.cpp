#include "ragged_bindings.h"

SIMT_BINDINGS(ragged_float32, module) { lagkv_simt::bind_ragged<float>(module, "ragged_float32"); }
