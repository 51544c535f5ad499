#include "lagkv_bindings.h"

SIMT_BINDINGS(lagkv_float32, module) { lagkv_simt::bind<float>(module, "lagkv_float32"); }
