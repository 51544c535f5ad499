// Messages of the executor about a faulty kernel, and names of lines of kernel code.
#pragma once

#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>

namespace simt {

/// A line of kernel code. A default argument `Site site = Site::current()` is the caller's line; it is one
/// pointer.
using Site = std::source_location;

inline bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

/// "csrc/cuda/compress.cuh:120 (void lagkv::...)"
std::string site_text(const Site& site);

/// A fault in a kernel. The text starts with what was found, and names kernel, block, thread and line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Throws a Fault of the running thread (or of the launch where none runs). `kind` is one of the names that
/// test_simt_executor.py proves, such as "out-of-bounds" or "race".
[[noreturn]] void fail(const char* kind, const Site& site, const std::string& what);

/// std::to_string joined: text("block ", 3, " of ", 4).
inline std::string text_of(const char* s) { return s; }
inline std::string text_of(const std::string& s) { return s; }
template <class T>
std::string text_of(T number) {
  return std::to_string(number);
}
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string all;
  ((all += text_of(parts)), ...);
  return all;
}

}  // namespace simt
