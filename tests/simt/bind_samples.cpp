// Bindings of the sample kernels and of those with planted faults.
#include "faulty_kernels.cuh"
#include "sample_kernels.cuh"
#include "session.h"

namespace {

using simt::Session;
using simt::TensorArg;

template <class T, class Kernel>
void run(Session& session, const char* name, Kernel kernel, const TensorArg& x, const TensorArg& y,
         bool keeps_y, dim3 grid, dim3 block, size_t shared_bytes, int64_t count, int32_t option) {
  samples::Arrays<T> params{};
  params.x = session.in<T>("x", x);
  params.y = keeps_y ? session.inout<T>("y", y) : session.out<T>("y", y);
  params.count = count < 0 ? x.numel() : count;
  params.option = option;
  session.launch(name, kernel, grid, block, shared_bytes, params);
}

/// module.name(session, x, y, *, grid, block, shared_bytes, count, option, keeps_y)
template <class T>
void define(pybind11::module_& module, const char* name, void (*kernel)(samples::Arrays<T>)) {
  namespace py = pybind11;
  using Size = std::vector<uint32_t>;
  module.def(
      name,
      [name, kernel](Session& session, const TensorArg& x, const TensorArg& y, const Size& grid,
                     const Size& block, size_t shared_bytes, int64_t count, int32_t option, bool keeps_y) {
        const auto size = [](const Size& s) {
          return dim3(s.at(0), s.size() > 1 ? s[1] : 1, s.size() > 2 ? s[2] : 1);
        };
        run<T>(session, name, kernel, x, y, keeps_y, size(grid), size(block), shared_bytes, count, option);
      },
      py::arg("session"), py::arg("x"), py::arg("y"), py::kw_only(), py::arg("grid") = Size{1},
      py::arg("block") = Size{32}, py::arg("shared_bytes") = 0, py::arg("count") = -1, py::arg("option") = 0,
      py::arg("keeps_y") = false);
}

}  // namespace

SIMT_BINDINGS(samples, parent) {
  pybind11::module_ module = parent.def_submodule("samples");
  define(module, "warp_sum", samples::warp_sum<float>);
  define(module, "warp_sum_double", samples::warp_sum<double>);
  define(module, "block_sum", samples::block_sum<float>);
  define(module, "positive_indices", samples::positive_indices<int>);
  define(module, "histogram", samples::histogram<int>);
  define(module, "transpose", samples::transpose<float>);
  define(module, "transpose_double", samples::transpose<double>);
  define(module, "copy_vectors", samples::copy_vectors<__half>);
  define(module, "gather_strided", samples::gather_strided<float>);
  define(module, "uneven_loops", samples::uneven_loops<float>);
  define(module, "warp_reverse", samples::warp_reverse<float>);
  define(module, "collectives", samples::collectives<float>);
  define(module, "meet_in_parts", samples::meet_in_parts<float>);
  define(module, "tickets", samples::tickets<int>);
  define(module, "many_shuffles", samples::many_shuffles<float>);
  define(module, "many_reads", samples::many_reads<float>);
}

SIMT_BINDINGS(faulty, parent) {
  pybind11::module_ module = parent.def_submodule("faulty");
#define DEFINE(kernel) define(module, #kernel, faulty::kernel)
  DEFINE(read_past_end);
  DEFINE(read_before_start);
  DEFINE(write_past_end);
  DEFINE(dynamic_shared_past_end);
  DEFINE(static_shared_past_end);
  DEFINE(no_dynamic_shared);
  DEFINE(misaligned_global);
  DEFINE(misaligned_shared);
  DEFINE(uninitialised_global);
  DEFINE(uninitialised_shared);
  DEFINE(stale_shared);
  DEFINE(write_input);
  DEFINE(stale_read_only_path);
  DEFINE(early_read_only_path);
  DEFINE(leaves_output_unwritten);
  DEFINE(missing_barrier);
  DEFINE(missing_barrier_before_overwrite);
  DEFINE(two_writers);
  DEFINE(two_writers_of_a_byte);
  DEFINE(warp_barrier_across_warps);
  DEFINE(half_warp_barrier);
  DEFINE(chain_of_warp_barriers);
  DEFINE(shuffle_as_barrier);
  DEFINE(plain_access_beside_atomics);
  DEFINE(global_shift_in_place);
  DEFINE(two_blocks_write);
  DEFINE(block_reads_what_another_writes);
  DEFINE(blocks_add_up);
  DEFINE(early_exit_before_barrier);
  DEFINE(barrier_in_branch);
  DEFINE(two_barriers_in_branches);
  DEFINE(caller_not_in_mask);
  DEFINE(masks_differ);
  DEFINE(lane_exited);
  DEFINE(lane_exits_later);
  DEFINE(lane_waits_at_barrier);
  DEFINE(full_mask_in_branch);
  DEFINE(circle_of_masks);
  DEFINE(full_mask_in_partial_warp);
  DEFINE(source_not_in_mask);
  DEFINE(odd_width);
  DEFINE(plain_global_read);
  DEFINE(plain_shared_write);
  DEFINE(null_pointer);
  DEFINE(wrong_space);
  DEFINE(stack_overflow);
  DEFINE(division_by_zero);
  DEFINE(trap);
  DEFINE(throws);
  DEFINE(waits_for_a_flag);
#undef DEFINE
}
