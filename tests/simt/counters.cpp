#include "counters.h"

#include <algorithm>

namespace simt {

void AccessCounts::add(const AccessCounts& other) {
  lanes += other.lanes;
  bytes += other.bytes;
  requests += other.requests;
  useful_bytes += other.useful_bytes;
  sectors += other.sectors;
  wavefronts += other.wavefronts;
  extra_wavefronts += other.extra_wavefronts;
}

double AccessCounts::sector_efficiency() const {
  return sectors == 0 ? 1.0 : static_cast<double>(useful_bytes) / (32.0 * static_cast<double>(sectors));
}

AccessCounts LaunchCounts::total(Space space, Kind kind) const {
  AccessCounts sum;
  for (const SiteCounts& site : sites) {
    if (site.space == space && site.kind == kind) sum.add(site.counts);
  }
  return sum;
}

uint64_t SiteTable::hash(const SiteCounts& entry) {
  const uint64_t what =
      entry.size << 4 | static_cast<uint32_t>(entry.space) << 2 | static_cast<uint32_t>(entry.kind);
  return ((reinterpret_cast<uintptr_t>(key(entry.site)) ^ what) * 0x9E3779B97F4A7C15u) >> 32;
}

uint32_t SiteTable::id(const Site& site, Space space, Kind kind, uint32_t size) {
  const SiteCounts wanted{site, space, kind, size, {}};
  for (size_t slot = hash(wanted);; ++slot) {
    uint32_t& found = slots_[slot & (slots_.size() - 1)];
    if (found == kFree) {
      const auto id = static_cast<uint32_t>(counts_.sites.size());
      found = id;
      counts_.sites.push_back(wanted);
      if (2 * counts_.sites.size() > slots_.size()) grow();
      return id;
    }
    const SiteCounts& entry = counts_.sites[found];
    if (key(entry.site) == key(site) && entry.size == size && entry.space == space && entry.kind == kind)
      return found;
  }
}

void SiteTable::grow() {
  slots_.assign(2 * slots_.size(), kFree);
  for (uint32_t id = 0; id < counts_.sites.size(); ++id) {
    size_t slot = hash(counts_.sites[id]);
    while (slots_[slot & (slots_.size() - 1)] != kFree) ++slot;
    slots_[slot & (slots_.size() - 1)] = id;
  }
}

namespace {

/// Sorts the addresses and drops repeated ones. They nearly always come ascending.
size_t distinct(uint64_t* addresses, size_t count) {
  bool ascending = true;
  for (size_t i = 1; i < count; ++i) ascending = ascending && addresses[i - 1] < addresses[i];
  if (ascending) return count;
  std::sort(addresses, addresses + count);
  return static_cast<size_t>(std::unique(addresses, addresses + count) - addresses);
}

/// Passes over the banks that distinct ascending addresses of one phase need: the most words that share a
/// bank.
uint32_t wavefronts_of(const uint64_t* addresses, size_t count, uint32_t size) {
  uint8_t words[32] = {};
  uint64_t last_word = UINT64_MAX;
  uint8_t most = 0;
  for (size_t i = 0; i < count; ++i) {
    for (uint64_t word = addresses[i] / 4; word * 4 < addresses[i] + size; ++word) {
      if (word == last_word) continue;  // neighbours within one word
      last_word = word;
      most = std::max(most, ++words[word % 32]);
    }
  }
  return most;
}

}  // namespace

void RequestLog::count(LaunchCounts& counts) {
  for (uint32_t r = 0; r < used_; ++r) {
    const Request& request = requests_[r];
    SiteCounts& site = counts.sites[request.site];
    const uint32_t size = site.size;
    AccessCounts& sum = site.counts;
    const auto lanes = static_cast<uint64_t>(__builtin_popcount(request.lanes));
    sum.lanes += lanes;
    sum.bytes += lanes * size;
    ++sum.requests;
    uint64_t addresses[32];
    if (site.space == Space::kGlobal) {
      size_t n = 0;
      for (uint32_t rest = request.lanes; rest != 0; rest &= rest - 1)
        addresses[n++] = request.addresses[__builtin_ctz(rest)];
      n = distinct(addresses, n);
      uint64_t sectors = 0;
      uint64_t last = UINT64_MAX;
      for (size_t i = 0; i < n; ++i) {  // aligned accesses of at most 16 bytes lie in one sector
        sectors += addresses[i] / 32 != last;
        last = addresses[i] / 32;
      }
      sum.sectors += sectors;
      sum.useful_bytes += n * size;
      continue;
    }
    // Accesses of 8 bytes go half a warp at a time, of 16 bytes a quarter.
    const uint32_t phase = size <= 4 ? 32 : size == 8 ? 16 : 8;
    for (uint32_t first = 0; first < 32; first += phase) {
      const uint32_t in_phase = phase == 32 ? request.lanes : request.lanes >> first & ((1u << phase) - 1);
      if (in_phase == 0) continue;
      size_t n = 0;
      for (uint32_t rest = in_phase; rest != 0; rest &= rest - 1) {
        addresses[n++] = request.addresses[first + static_cast<uint32_t>(__builtin_ctz(rest))];
      }
      const size_t all = n;
      n = distinct(addresses, n);
      sum.useful_bytes += n * size;
      // Atomics to one address are done one after the other.
      const uint32_t passes = wavefronts_of(addresses, n, size) +
                              (site.kind == Kind::kAtomic ? static_cast<uint32_t>(all - n) : 0);
      sum.wavefronts += passes;
      sum.extra_wavefronts += passes - 1;
    }
  }
  restart();
}

}  // namespace simt
