#include "instances.h"

LAGKV_INSTANCES(float)
