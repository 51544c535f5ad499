#include "lagkv_bindings.h"

SIMT_BINDINGS(lagkv_float16, module) { lagkv_simt::bind<__half>(module, "lagkv_float16"); }
