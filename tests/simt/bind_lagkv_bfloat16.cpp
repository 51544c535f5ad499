#include "lagkv_bindings.h"

SIMT_BINDINGS(lagkv_bfloat16, module) { lagkv_simt::bind<__nv_bfloat16>(module, "lagkv_bfloat16"); }
