#include "instances.h"

LAGKV_INSTANCES(__half)
