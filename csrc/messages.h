// Error messages of the operators: which argument, what it must be and what it got, in Python's notation.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace lagkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws std::runtime_error (in Python RuntimeError) unless the condition holds. The parts become text only
/// then, so that a call with nothing wrong does not pay for words.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "lagkv::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

struct ShapeText {
  const Tensor& x;
};
struct StridesText {
  const Tensor& x;
};
struct DtypeText {
  const Tensor& x;
};
struct DeviceText {
  const Tensor& x;
};

template <class Numbers>
std::ostream& write_list(std::ostream& out, const Numbers& numbers) {
  const char* separator = "[";
  if (numbers.size() == 0) out << separator;
  for (const int64_t n : numbers) {
    out << separator << n;
    separator = ", ";
  }
  return out << "]";
}

inline std::ostream& operator<<(std::ostream& out, ShapeText shape) {
  return write_list(out, shape.x.sizes());
}

inline std::ostream& operator<<(std::ostream& out, StridesText strides) {
  return write_list(out, strides.x.strides());
}

inline std::ostream& operator<<(std::ostream& out, DtypeText dtype) {
  switch (dtype.x.scalar_type()) {
    case ScalarType::Half: return out << "float16";
    case ScalarType::BFloat16: return out << "bfloat16";
    case ScalarType::Float: return out << "float32";
    case ScalarType::Double: return out << "float64";
    case ScalarType::Bool: return out << "bool";
    case ScalarType::Byte: return out << "uint8";
    case ScalarType::Char: return out << "int8";
    case ScalarType::Short: return out << "int16";
    case ScalarType::Int: return out << "int32";
    case ScalarType::Long: return out << "int64";
    case ScalarType::Float8_e4m3fn: return out << "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return out << "float8_e5m2";
    case ScalarType::ComplexFloat: return out << "complex64";
    case ScalarType::ComplexDouble: return out << "complex128";
    default: return out << "scalar type " << static_cast<int>(dtype.x.scalar_type());
  }
}

inline std::ostream& operator<<(std::ostream& out, DeviceText device) {
  if (device.x.is_cpu()) return out << "cpu";
  if (device.x.is_cuda()) {
    out << "cuda";
  } else {
    out << "device type " << static_cast<int>(device.x.device().type());
  }
  return out << ":" << device.x.get_device_index();
}

}  // namespace lagkv
