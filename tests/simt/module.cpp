// The Python face of the executor: tensors, sessions, counters. Kernels are bound in bind_*.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "session.h"

namespace py = pybind11;

namespace simt {

std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

namespace {

py::dict access_dict(Space space, const AccessCounts& counts) {
  py::dict all;
  all["lanes"] = counts.lanes;
  all["bytes"] = counts.bytes;
  all["requests"] = counts.requests;
  all["useful_bytes"] = counts.useful_bytes;
  if (space == Space::kGlobal) {
    all["sectors"] = counts.sectors;
    all["sector_efficiency"] = counts.sector_efficiency();
  } else {
    all["wavefronts"] = counts.wavefronts;
    all["extra_wavefronts"] = counts.extra_wavefronts;
  }
  return all;
}

const char* space_name(Space space) { return space == Space::kGlobal ? "global" : "shared"; }
const char* kind_name(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
}

/// Record of one launch, or of several together.
py::dict totals_dict(const std::vector<LaunchCounts>& launches) {
  py::dict all;
  for (const Space space : {Space::kGlobal, Space::kShared}) {
    for (const Kind kind : {Kind::kRead, Kind::kWrite, Kind::kAtomic}) {
      AccessCounts sum;
      for (const LaunchCounts& launch : launches) sum.add(launch.total(space, kind));
      all[py::str(text(space_name(space), "_", kind_name(kind)))] = access_dict(space, sum);
    }
  }
  LaunchCounts sum;
  for (const LaunchCounts& launch : launches) {
    sum.unique_bytes_read += launch.unique_bytes_read;
    sum.unique_bytes_written += launch.unique_bytes_written;
    sum.barriers += launch.barriers;
    sum.warp_barriers += launch.warp_barriers;
    sum.shuffles += launch.shuffles;
    sum.votes += launch.votes;
    sum.switches += launch.switches;
  }
  all["global_read"]["unique_bytes"] = sum.unique_bytes_read;
  all["global_write"]["unique_bytes"] = sum.unique_bytes_written;
  all["barriers"] = sum.barriers;
  all["warp_barriers"] = sum.warp_barriers;
  all["shuffles"] = sum.shuffles;
  all["votes"] = sum.votes;
  all["switches"] = sum.switches;
  return all;
}

py::dict launch_dict(const LaunchCounts& launch) {
  py::dict all = totals_dict({launch});
  all["kernel"] = launch.kernel;
  all["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  all["block"] = py::make_tuple(launch.block[0], launch.block[1], launch.block[2]);
  all["dynamic_shared_bytes"] = launch.dynamic_shared_bytes;
  all["static_shared_bytes"] = launch.static_shared_bytes;
  py::list sites;
  for (const SiteCounts& site : launch.sites) {
    py::dict one = access_dict(site.space, site.counts);
    one["access"] = text(space_name(site.space), "_", kind_name(site.kind));
    one["size"] = site.size;
    one["file"] = site.site.file_name();
    one["line"] = site.site.line();
    one["column"] = site.site.column();
    one["function"] = site.site.function_name();
    sites.append(one);
  }
  all["sites"] = sites;
  return all;
}

Order order_of(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw py::value_error("order must be 'forward', 'reverse' or 'random', got '" + name + "'");
}

}  // namespace
}  // namespace simt

PYBIND11_MODULE(lagkv_simt, module) {
  using namespace simt;
  module.doc() =
      "Runs CUDA kernels thread by thread on the CPU, with the checks of a sanitizer and the counters of a "
      "profiler.";
  py::register_exception<Fault>(module, "Fault", PyExc_AssertionError);

  py::class_<TensorArg>(module, "Tensor",
                        "Where a tensor's elements and its storage lie; strides in elements.")
      .def(py::init([](uintptr_t data, size_t itemsize, std::vector<int64_t> shape,
                       std::vector<int64_t> strides, uintptr_t storage, size_t storage_bytes,
                       py::object owner) {
             TensorArg tensor{data,    itemsize,      std::move(shape), std::move(strides),
                              storage, storage_bytes, nullptr};
             tensor.owner = std::make_shared<py::object>(std::move(owner));
             return tensor;
           }),
           py::arg("data"), py::arg("itemsize"), py::arg("shape"), py::arg("strides"), py::arg("storage"),
           py::arg("storage_bytes"), py::arg("owner"));

  py::class_<Session>(module, "Session", "One operator call: buffers, launches, counters.")
      .def(py::init([](const std::string& order, uint64_t seed, bool detect, bool count,
                       bool races_between_blocks, uint64_t max_accesses) {
             return std::make_unique<Session>(
                 Config{detect, count, races_between_blocks, order_of(order), seed, max_accesses});
           }),
           py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0, py::arg("detect") = true,
           py::arg("count") = true, py::arg("races_between_blocks") = true,
           py::arg("max_accesses") = Config().max_accesses)
      .def(
          "counts", [](const Session& session) { return totals_dict(session.launches()); },
          "Sums over the launches.")
      .def(
          "launches",
          [](const Session& session) {
            py::list all;
            for (const LaunchCounts& launch : session.launches()) all.append(launch_dict(launch));
            return all;
          },
          "One dict per launch: the sums, the configuration, and every call site.")
      .def(
          "unwritten", [](const Session& session) { return session.memory().unwritten(); },
          "[(name, elements)] of the out tensors that were not wholly written.")
      .def(
          "written",
          [](const Session& session, const std::string& name) {
            return py::bytes(session.memory().written(name));
          },
          py::arg("name"), "One byte per element, row-major: 1 where a kernel wrote it.");

  for (const Binder bind : binders()) bind(module);
}
