// A `str` argument of an operator. A kernel takes it as StringHandle, which is what crosses the stable ABI,
// and reads it here: the conversion to std::string in torch's headers before 2.14 allocates a second string
// on every call and never frees it (https://github.com/pytorch/pytorch/issues/191340), and a library built
// with those headers would keep leaking under a newer torch. tests/ops/test_memory.py watches every operator
// for such growth.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace lagkv {

/// The text of an argument, which is freed whatever happens after. To be called once for each, before
/// anything throws.
inline std::string take_text(StringHandle argument) {
  const std::unique_ptr<StringOpaque, decltype(&torch_delete_string)> owner(argument, &torch_delete_string);
  size_t length = 0;
  const char* text = nullptr;
  if (torch_string_length(argument, &length) != 0 || torch_string_c_str(argument, &text) != 0) {
    throw std::runtime_error("lagkv: torch did not hand over the text of an argument");
  }
  return {text, length};
}

}  // namespace lagkv
