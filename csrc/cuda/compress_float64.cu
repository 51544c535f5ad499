#include "compress_instances.h"

LAGKV_COMPRESS_INSTANCES(double)
