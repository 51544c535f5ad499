// The schemas of torch.ops.lagkv, and nothing else: operators.h implements them, for the backends that
// register it (cpu/ops.cpp, cuda/ops.cu); fake kernels and derivatives are in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lagkv, m) {
  m.def(
      "compress(Tensor key, Tensor value, SymInt start, SymInt lag_size, SymInt keep, *, "
      "float value_weight=1.0, str score=\"std\", int smooth=1, str budget=\"partition\") -> "
      "(Tensor key, Tensor value, Tensor index)");
  m.def(
      "compress_carried(Tensor key, Tensor value, Tensor carried, SymInt start, SymInt lag_size, SymInt "
      "keep, "
      "*, float value_weight=1.0, str score=\"std\", int smooth=1) -> "
      "(Tensor key, Tensor value, Tensor index, Tensor carried)");
  m.def(
      "compress_(Tensor(a!) key, Tensor(b!) value, SymInt start, SymInt lag_size, SymInt keep, *, "
      "float value_weight=1.0, str score=\"std\", int smooth=1, str budget=\"partition\", "
      "Tensor(c!)? scores=None, SymInt sink_size=0) -> Tensor index");
  m.def("partition_bounds(Tensor x, SymInt start, SymInt lag_size) -> Tensor");
  m.def(
      "lag_score(Tensor key, Tensor value, SymInt start, SymInt lag_size, *, float value_weight=1.0, "
      "str score=\"std\", int smooth=1) -> Tensor");
  m.def("topk_index(Tensor score, SymInt keep) -> Tensor");
  m.def("compact(Tensor x, Tensor index) -> Tensor");
  m.def(
      "compress_ragged_(Tensor(a!) key, Tensor(b!) value, Tensor(c!) start, Tensor(d!) length, SymInt "
      "lag_size, SymInt keep, *, float value_weight=1.0, str score=\"std\", int smooth=1, "
      "str budget=\"partition\", Tensor(e!)? scores=None, SymInt sink_size=0) -> Tensor index");
  m.def(
      "compress_varlen(Tensor key, Tensor value, Tensor cu_seqlens, Tensor start, SymInt lag_size, SymInt "
      "keep, *, float value_weight=1.0, str score=\"std\", int smooth=1, str budget=\"partition\") -> "
      "(Tensor key, Tensor value, Tensor index, Tensor cu_seqlens, Tensor start)");
  m.def(
      "compress_paged_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, Tensor(c!) start, "
      "Tensor(d!) length, SymInt lag_size, SymInt keep, *, float value_weight=1.0, str score=\"std\", "
      "int smooth=1, str budget=\"partition\", Tensor(e!)? scores=None, SymInt sink_size=0) -> "
      "Tensor index");
  m.def(
      "compress_blocks(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor source_table, Tensor "
      "target_table, Tensor m_before, Tensor m_after, SymInt sink_size, SymInt lag_size, SymInt keep, *, "
      "float value_weight=1.0, str score=\"std\", int smooth=1) -> Tensor index");
  // Checks of validate=True of the ragged functions on numbers that were copied to the host.
  m.def("_check_slots(Tensor start, Tensor length, int capacity) -> ()");
  m.def("_check_packed(Tensor cu_seqlens, Tensor start, int rows) -> ()");
  m.def(
      "_check_pages(Tensor block_table, Tensor start, Tensor length, int lag_size, int keep, int blocks, int "
      "block_size, bool scored=False, int sink_size=0) -> ()");
  m.def(
      "_check_blocks(Tensor source_table, Tensor target_table, Tensor m_before, Tensor m_after, int "
      "sink_size, int lag_size, int keep, int blocks, int block_size) -> ()");
  // Instruction set the CPU kernels use: "portable", "avx2" or "avx512" (LAGKV_CPU_ISA overrides the choice).
  m.def("_cpu_isa() -> str");
}
