#include "instances.h"

LAGKV_INSTANCES(__nv_bfloat16)
