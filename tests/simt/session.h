// One operator call in the executor: its buffers, its launches, and what was counted and found. How a kernel
// is bound:
//
//   #include "session.h"                                      // tests/simt/bind_scale.cpp; CMake takes every
//   bind_*.cpp #include "cuda/scale.cuh"                                 // csrc/ is on the include path
//
//   SIMT_BINDINGS(scale, module) {
//     module.def("scale", [](simt::Session& session, const simt::TensorArg& x, const simt::TensorArg& y,
//     float factor) {
//       ScaleParams params;
//       params.x = session.in<float>("x", x);                 // may only be read
//       params.y = session.out<float>("y", y);                // starts as uninitialised, every byte must be
//       written params.count = x.numel();                             // session.inout and
//       session.scratch<T>(name, count) as well const Plan plan = plan_scale(params.count);           // the
//       planner that the .cu launcher uses session.launch("scale", scale_kernel<float>, plan.grid,
//       plan.block, plan.shared_bytes, params);
//     });
//   }
//
// and in Python (tests/simt/__init__.py):
//
//   session = simt.Session(order="random", seed=3)
//   simt.module().scale(session, simt.tensor(x), simt.tensor(y), 2.0)      # a fault raises simt.Fault
//   assert not session.unwritten()
//   session.counts()["global_read"]["sector_efficiency"], session.launches()[0]["sites"]
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <vector>

#include "executor.h"

namespace simt {

class Session {
 public:
  explicit Session(const Config& config) : config_(config) {}

  /// The kernels' pointer to the first element of a tensor of the caller. T must have the tensor's element
  /// size.
  template <class T>
  const T* in(const std::string& name, const TensorArg& tensor) {
    return static_cast<const T*>(add(name, Role::kIn, tensor, sizeof(T)));
  }
  template <class T>
  T* out(const std::string& name, const TensorArg& tensor) {
    return static_cast<T*>(add(name, Role::kOut, tensor, sizeof(T)));
  }
  template <class T>
  T* inout(const std::string& name, const TensorArg& tensor) {
    return static_cast<T*>(add(name, Role::kInOut, tensor, sizeof(T)));
  }
  /// Uninitialised memory of the session, aligned to 256 bytes.
  template <class T>
  T* scratch(const std::string& name, size_t count) {
    return static_cast<T*>(memory_.add_scratch(name, count * sizeof(T)));
  }

  /// kernel<<<grid, block, shared_bytes>>>(params), done when this returns. Throws the first Fault.
  template <class P, class Q>
  void launch(const char* name, void (*kernel)(P), dim3 grid, dim3 block, size_t shared_bytes,
              const Q& params) {
    using Params = std::remove_cv_t<std::remove_reference_t<P>>;
    static_assert(!std::is_reference_v<P>, "a kernel takes its params by value");
    static_assert(std::is_same_v<Params, Q> && std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096,
                  "params are one trivially copyable struct of at most 4 KiB");
    struct Call {
      void (*kernel)(P);
      const Params* params;
    };
    const Call call{kernel, &params};
    const auto invoke = [](const void* raw) {
      const Call& call = *static_cast<const Call*>(raw);
      call.kernel(*call.params);
    };
    launches_.push_back(
        Executor::instance().run({name, grid, block, shared_bytes, invoke, &call}, memory_, config_));
  }

  const GlobalMemory& memory() const { return memory_; }
  const std::vector<LaunchCounts>& launches() const { return launches_; }

 private:
  void* add(const std::string& name, Role role, const TensorArg& tensor, size_t size) {
    if (tensor.itemsize != size) {
      throw std::runtime_error(
          text("simt: '", name, "' has elements of ", tensor.itemsize, " bytes, the kernel's have ", size));
    }
    return memory_.add(name, role, tensor);
  }

  Config config_;
  GlobalMemory memory_;
  std::vector<LaunchCounts> launches_;
};

/// Functions that add bindings to the module when it is made.
using Binder = void (*)(pybind11::module_&);
std::vector<Binder>& binders();

}  // namespace simt

/// Opens the body of a function that adds bindings to `module`, and has it called. `name` is unique in the
/// module.
#define SIMT_BINDINGS(name, module)                                                   \
  static void bind_##name(pybind11::module_& module);                                 \
  static const bool bound_##name = (::simt::binders().push_back(&bind_##name), true); \
  static void bind_##name([[maybe_unused]] pybind11::module_& module)
