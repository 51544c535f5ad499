// The launch planner and the argument structs of the operators' bindings.
#include "lagkv_bindings.h"

namespace py = pybind11;
using namespace lagkv::cuda;

SIMT_BINDINGS(lagkv_plan, module) {
  py::class_<lagkv_simt::Sizes>(module, "Sizes")
      .def(py::init([](int64_t start, int64_t lag_size, int64_t keep, double value_weight, std::string score,
                       int64_t smooth, std::string budget, int64_t sink_size) {
             return lagkv_simt::Sizes{start,  lag_size,          keep,     value_weight, std::move(score),
                                      smooth, std::move(budget), sink_size};
           }),
           py::arg("start"), py::arg("lag_size"), py::arg("keep"), py::arg("value_weight") = 1.0,
           py::arg("score") = "std", py::arg("smooth") = 1, py::arg("budget") = "partition",
           py::arg("sink_size") = 0);

  py::class_<Device>(module, "Device", "Limits the planner keeps to.")
      .def(py::init([](int64_t multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor) {
             return Device{multiprocessors, shared_per_block, shared_per_multiprocessor};
           }),
           py::kw_only(), py::arg("multiprocessors") = Device().multiprocessors,
           py::arg("shared_per_block") = Device().shared_per_block,
           py::arg("shared_per_multiprocessor") = Device().shared_per_multiprocessor);

  module.def(
      "row_shape",
      [](int element_size, int64_t dim, bool aligned) {
        const RowShape shape = row_shape(element_size, dim, aligned);
        return py::make_tuple(shape.elements, shape.lanes, shape.chunks);
      },
      py::arg("element_size"), py::arg("dim"), py::arg("aligned") = true);

  module.def(
      "plan_compress",
      [](int element_size, int64_t key_dim, int64_t value_dim, int64_t heads, int64_t length, int64_t start,
         int64_t lag_size, int64_t keep, bool scores_wanted, bool aligned, bool blend, const Device& device) {
        const RowShape shape = row_shape(element_size, std::max(key_dim, value_dim), aligned, blend);
        const CompressPlan plan = plan_compress(shape, element_size, key_dim, value_dim, heads, length, start,
                                                lag_size, keep, scores_wanted, !scores_wanted, device, blend);
        py::dict all;
        all["partitions"] = plan.partitions;
        all["run"] = plan.run;
        all["runs"] = plan.runs;
        all["run_blocks"] = plan.run_blocks;
        all["copy_blocks"] = plan.copy_blocks;
        all["copy_tiles"] = plan.copy_tiles;
        all["blocks"] = plan.blocks;
        all["scratch_bytes"] = plan.scratch_bytes;
        all["shared_bytes"] = plan.storage.shared_bytes;
        all["statistics_in_scratch"] = plan.storage.statistics_in_scratch;
        all["reference_in_scratch"] = plan.storage.reference_in_scratch;
        return all;
      },
      py::arg("element_size"), py::arg("key_dim"), py::arg("value_dim"), py::arg("heads"), py::arg("length"),
      py::arg("start"), py::arg("lag_size"), py::arg("keep"), py::kw_only(), py::arg("scores_wanted") = false,
      py::arg("aligned") = true, py::arg("blend") = false, py::arg("device") = Device());

  module.def(
      "plan_move",
      [](int access_bytes, int64_t key_columns, int64_t value_columns, int64_t heads, int64_t first,
         int64_t rows, const Device& device) {
        const MovePlan plan = plan_move(access_bytes, key_columns, value_columns, heads, first, rows, device);
        py::dict all;
        all["slice"] = plan.slices.slice;
        all["key_slices"] = plan.slices.key_slices;
        all["value_slices"] = plan.slices.value_slices;
        all["blocks"] = plan.blocks;
        return all;
      },
      py::arg("access_bytes"), py::arg("key_columns"), py::arg("value_columns"), py::arg("heads"),
      py::arg("first"), py::arg("rows"), py::arg("device") = Device());

  module.def(
      "plan_ragged",
      [](int element_size, int64_t key_dim, int64_t value_dim, int64_t batch, int64_t heads, int64_t rows,
         int64_t lag_size, int64_t keep, bool packed, bool aligned, bool scores_wanted, bool blend,
         const Device& device) {
        const RowShape shape = row_shape(element_size, std::max(key_dim, value_dim), aligned, blend);
        const RaggedPlan plan = plan_ragged(shape, element_size, key_dim, value_dim, batch, heads, rows,
                                            lag_size, keep, packed, device, scores_wanted, blend);
        py::dict all;
        all["concurrent"] = plan.concurrent;
        all["blocks"] = plan.blocks;
        all["tile"] = plan.tile;
        all["scratch_bytes"] = plan.scratch_bytes;
        all["shared_bytes"] = plan.storage.shared_bytes;
        all["rows"] = plan.storage.rows;
        all["rows_in_scratch"] = plan.storage.rows_in_scratch;
        all["statistics_in_scratch"] = plan.storage.statistics_in_scratch;
        return all;
      },
      py::arg("element_size"), py::arg("key_dim"), py::arg("value_dim"), py::arg("batch"), py::arg("heads"),
      py::arg("rows"), py::arg("lag_size"), py::arg("keep"), py::kw_only(), py::arg("packed") = false,
      py::arg("aligned") = true, py::arg("scores_wanted") = false, py::arg("blend") = false,
      py::arg("device") = Device());

  module.def("grid_of", &grid_of, py::arg("blocks"));
  module.attr("threads") = kThreads;
  module.attr("copy_rows") = kCopyRows;
  module.attr("rank_limit") = kRankLimit;
}
