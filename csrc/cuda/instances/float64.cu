#include "instances.h"

LAGKV_INSTANCES(double)
