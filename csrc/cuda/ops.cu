// CUDA's launchers for operators.h, and the registration of the operators on CUDA tensors. Starts, lengths
// and block tables are read on the device alone (schedule.cuh defines the result of invalid ones), so
// nothing waits for it and a captured graph follows them.
#include "launch.h"
#include "operators.h"
#include "torch_launch.h"

namespace lagkv::cuda {

// In instances/: these kernels take long to compile.
template <class T>
void run_ragged(Launcher& launcher, const RaggedParams<T>& args, const SequenceTable& table);

template <class T>
void run_blocks(Launcher& launcher, const BlocksParams<T>& args);

namespace {

/// Each launcher goes the same way: device guard and current stream (made with the backend), empty, launches.
class Backend {
 public:
  using Half = __half;
  using BFloat16 = __nv_bfloat16;
  template <class T>
  using RealOf = cuda::RealOf<T>;

  explicit Backend(const Tensor& like) : launcher_(like) {}

  template <class T>
  void compress(const CompressParams<T>& p) {
    require_kernels(p.carried.exists ? "compress_carried" : "compress", p.method);
    if (rows_of(p) == 0) return;
    run_compress<T, RealOf<T>>(launcher_, p, nullptr);
  }

  template <class T>
  void compress_(const CompressParams<T>& p) {
    require_kernels("compress_", p.method);
    if (rows_of(p) == 0) return;
    CompressParams<T> select_only = p;
    select_only.key_out = select_only.value_out = {};
    run_compress<T, RealOf<T>>(launcher_, select_only, nullptr);
    const int64_t rows = output_length(p.length, p.start, p.lag_size, p.keep);
    if (rows == p.length) return;  // every row is kept
    launch_move(p.key_out, p.value_out, p.index, p.batch, p.heads, p.start, rows, launcher_.device(),
                launcher_);
  }

  template <class T>
  void partition_bounds(const BoundsParams<T, RealOf<T>>& p) {
    if (p.batch * p.heads * p.x.dim == 0) return;
    launch_bounds<T>(p, launcher_);
  }

  template <class T>
  void lag_score(const ScoreParams<T, RealOf<T>>& p) {
    require_kernels("lag_score", p.method);
    const int64_t partitions = compressed_count(p.length, p.start, p.lag_size);
    if (p.batch * p.heads * partitions == 0) return;
    const CompressParams<T> score_only{p.key,    p.value, {},         {},         nullptr,  p.batch, p.heads,
                                       p.length, p.start, p.lag_size, p.lag_size, p.method, {}};
    run_compress<T, RealOf<T>>(launcher_, score_only, p.score);
  }

  template <class T>
  void topk_index(const TopkParams<T>& p) {
    if (p.rows == 0) return;
    launch_topk<T>(p, launcher_.device(), launcher_);
  }

  template <class T>
  void compact(const CompactParams<T>& p) {
    if (p.batch * p.heads * p.count * p.x.dim == 0) return;
    launch_compact(p, launcher_);
  }

  template <class T>
  void compress_ragged_(const RaggedParams<T>& p) {
    require_kernels("compress_ragged_", p.method);
    in_place(p);
  }

  template <class T>
  void compress_varlen(const RaggedParams<T>& p) {
    require_kernels("compress_varlen", p.method);
    run_ragged<T>(launcher_, p, table_of(p));
  }

  template <class T>
  void compress_paged_(const RaggedParams<T>& p) {
    require_kernels("compress_paged_", p.method);
    in_place(p);
  }

  template <class T>
  void compress_blocks(const BlocksParams<T>& p) {
    require_kernels("compress_blocks", p.method);
    run_blocks<T>(launcher_, p);
  }

 private:
  template <class T>
  static int64_t rows_of(const CompressParams<T>& p) {
    return p.batch * p.heads * output_length(p.length, p.start, p.lag_size, p.keep);
  }

  template <class T>
  SequenceTable table_of(const RaggedParams<T>& p) {
    return make_table(p.batch, [&](int64_t bytes) { return launcher_.scratch(bytes); });
  }

  template <class T>
  void in_place(const RaggedParams<T>& p) {
    const SequenceTable table = table_of(p);
    run_ragged<T>(launcher_, p, table);
    launch_ragged_move(p, table, launcher_.device(), launcher_);
  }

  Launcher launcher_;
};

}  // namespace
}  // namespace lagkv::cuda

STABLE_TORCH_LIBRARY_IMPL(lagkv, CUDA, m) { lagkv::Operators<lagkv::cuda::Backend>::register_with(m); }
