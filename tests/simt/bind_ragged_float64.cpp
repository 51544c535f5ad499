#include "ragged_bindings.h"

SIMT_BINDINGS(ragged_float64, module) { lagkv_simt::bind_ragged<double>(module, "ragged_float64"); }
