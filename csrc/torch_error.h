// STABLE_TORCH_ERROR_CODE_CHECK(call) throws where a function of torch's C interface reports an error, with
// torch's own words. Older headers of the releases that this library is built with (2.10, 2.11) have only the
// macro that says which call it was.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
