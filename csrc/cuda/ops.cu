// CUDA's launchers for operators.h, and the registration of the operators on CUDA tensors. Starts, lengths
// and block tables are read on the device alone (schedule.cuh defines the result of invalid ones), so
// nothing waits for it and a captured graph follows them.
#include "launch.h"
#include "operators.h"
#include "staged.h"
#include "torch_launch.h"

namespace lagkv::cuda {

// In instances/, one source file per T: these kernels take long to compile. They do what launch_compress and
// launch_ragged say.
template <class T, class Real>
void run_compress(Launcher& launcher, const CompressParams<T>& args, const ScoreTarget<Real>& score);
template <class T, class Real>
void run_ragged(Launcher& launcher, const RaggedParams<T>& args, const SequenceTable& table,
                const ScoreTarget<Real>& score);

template <class T>
void run_blocks(Launcher& launcher, const BlocksParams<T>& args);

namespace {

/// Each launcher goes the same way: device guard and current stream (made with the backend), empty, launches.
class Backend {
  // Before its callers: a return type that is deduced is known from here on.
  auto scratch() {
    return [this](int64_t bytes) { return launcher_.scratch(bytes); };
  }

  template <class T>
  auto score_rows() {
    return [this](const CompressParams<T>& p, const ScoreTarget<RealOf<T>>& score) {
      run_compress<T, RealOf<T>>(launcher_, p, score);
    };
  }

 public:
  using Half = __half;
  using BFloat16 = __nv_bfloat16;
  template <class T>
  using RealOf = cuda::RealOf<T>;

  explicit Backend(const Tensor& like) : launcher_(like) {}

  template <class T>
  void compress(const CompressParams<T>& p) {
    if (is_staged(p)) return staged(p, false);
    if (rows_of(p) == 0) return;
    run_compress<T, RealOf<T>>(launcher_, p, {});
  }

  template <class T>
  void compress_(const CompressParams<T>& p) {
    if (is_staged(p)) return staged(p, true);
    if (rows_of(p) == 0) return;
    CompressParams<T> select_only = p;
    select_only.key_out = select_only.value_out = {};
    run_compress<T, RealOf<T>>(launcher_, select_only, {});
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
    const CompressParams<T> score_only{p.key,    p.value, {},         {},         nullptr,  p.batch, p.heads,
                                       p.length, p.start, p.lag_size, p.lag_size, p.method, {}};
    const int64_t partitions = compressed_count(p.length, p.start, p.lag_size);
    if (p.batch * p.heads * partitions == 0) return;
    run_compress<T, RealOf<T>>(launcher_, score_only, {p.score, partitions * p.lag_size});
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
    in_place(p);
  }

  template <class T>
  void compress_varlen(const RaggedParams<T>& p) {
    ragged(p, table_of(p));
  }

  template <class T>
  void compress_paged_(const RaggedParams<T>& p) {
    in_place(p);
  }

  template <class T>
  void compress_blocks(const BlocksParams<T>& p) {
    run_blocks<T>(launcher_, p);
  }

 private:
  template <class T>
  static int64_t rows_of(const CompressParams<T>& p) {
    return p.batch * p.heads * output_length(p.length, p.start, p.lag_size, p.keep);
  }

  template <class T>
  void staged(const CompressParams<T>& p, bool in_place) {
    launch_staged(p, in_place, launcher_.device(), scratch(), launcher_, score_rows<T>());
  }

  template <class T>
  SequenceTable table_of(const RaggedParams<T>& p) {
    return make_table(p.batch, scratch());
  }

  template <class T>
  void ragged(const RaggedParams<T>& p, const SequenceTable& table) {
    if (!is_staged(p)) return run_ragged<T, RealOf<T>>(launcher_, p, table, {});
    launch_staged(
        p, table, launcher_.device(), scratch(), launcher_,
        [this](const RaggedParams<T>& p, const SequenceTable& table, const ScoreTarget<RealOf<T>>& score) {
          run_ragged<T, RealOf<T>>(launcher_, p, table, score);
        });
  }

  template <class T>
  void in_place(const RaggedParams<T>& p) {
    const SequenceTable table = table_of(p);
    ragged(p, table);
    launch_ragged_move(p, table, launcher_.device(), launcher_);
  }

  Launcher launcher_;
};

}  // namespace
}  // namespace lagkv::cuda

STABLE_TORCH_LIBRARY_IMPL(lagkv, CUDA, m) { lagkv::Operators<lagkv::cuda::Backend>::register_with(m); }
