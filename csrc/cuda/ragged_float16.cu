#include "ragged_instances.h"

LAGKV_RAGGED_INSTANCES(__half)
