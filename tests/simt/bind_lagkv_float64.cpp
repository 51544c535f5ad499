#include "lagkv_bindings.h"

SIMT_BINDINGS(lagkv_float64, module) { lagkv_simt::bind<double>(module, "lagkv_float64"); }
