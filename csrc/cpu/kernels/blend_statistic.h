// The statistics of a blend: of each partition the bounds and the mean direction, of each token the std
// statistic against the former and minus the cosine to the latter. A tile comes from memory once: the
// direction's pass finds in the cache what the bounds' pass has read.

namespace lagkv::cpu::LAGKV_ISA {

template <class T>
Tile<T> read_before(const Tile<T>& tile) {
  return {tile.rows, tile.row_stride, tile.count, tile.dim, {}};
}

template <class T>
void blend_reference(const Tile<T>& tile, RealOf<T>* reference) {
  std_reference(tile, reference);
  cosine_reference(read_before(tile), reference + reference_part(tile.dim));
}

template <class T>
void blend_statistic(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic) {
  std_statistic(tile, reference, statistic);
  cosine_statistic(read_before(tile), reference + reference_part(tile.dim), statistic + padded(tile.count));
}

template <class T>
void blend_advance(const Tile<T>& tile, const RealOf<T>* reference, RealOf<T>* statistic, RealOf<T>* next) {
  const int64_t part = reference_part(tile.dim);
  std_advance(tile, reference, statistic, next);
  cosine_advance(read_before(tile), reference + part, statistic + padded(tile.count), next + part);
}

}  // namespace lagkv::cpu::LAGKV_ISA
