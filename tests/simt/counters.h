// Counters of a profiler: bytes, warp requests, 32-byte sectors, shared-memory wavefronts, per call site
// and in all.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

namespace simt {

enum class Space : uint8_t { kGlobal, kShared };
enum class Kind : uint8_t { kRead, kWrite, kAtomic };

/// Counters of one call site, or sums of them.
struct AccessCounts {
  uint64_t lanes = 0;         // accesses of single threads
  uint64_t bytes = 0;         // what they asked for
  uint64_t requests = 0;      // warp instructions: the same site's n-th execution by the lanes of one warp
  uint64_t useful_bytes = 0;  // distinct bytes, request by request
  uint64_t sectors = 0;       // global: distinct 32-byte sectors, request by request
  uint64_t wavefronts = 0;    // shared: passes over the 32 banks
  uint64_t extra_wavefronts = 0;  // shared: those that bank conflicts cost

  void add(const AccessCounts& other);
  /// useful_bytes / (32 sectors); 1 where nothing was accessed.
  double sector_efficiency() const;
};

struct SiteCounts {
  Site site;
  Space space;
  Kind kind;
  uint32_t size;
  AccessCounts counts;
};

struct LaunchCounts {
  std::string kernel;
  uint32_t grid[3]{}, block[3]{};
  uint64_t dynamic_shared_bytes = 0, static_shared_bytes = 0;
  uint64_t unique_bytes_read = 0, unique_bytes_written = 0;  // global
  uint64_t barriers = 0;                                     // __syncthreads, per block
  uint64_t warp_barriers = 0;                                // __syncwarp, per warp
  uint64_t shuffles = 0;                                     // per warp and 4 bytes
  uint64_t votes = 0;                                        // ballot, any, all, match, reduce; per warp
  uint64_t switches = 0;                                     // of fibres: the executor's own work
  std::vector<SiteCounts> sites;

  AccessCounts total(Space space, Kind kind) const;
};

/// Numbers the call sites of a launch.
class SiteTable {
 public:
  explicit SiteTable(LaunchCounts& counts) : counts_(counts), slots_(256, kFree) {}
  uint32_t id(const Site& site, Space space, Kind kind, uint32_t size);

 private:
  static constexpr uint32_t kFree = UINT32_MAX;
  /// The address of the site's constant data: one for each call site of an instantiation.
  static const void* key(const Site& site) {
    const void* pointer;
    static_assert(sizeof(pointer) == sizeof(site));
    __builtin_memcpy(&pointer, &site, sizeof(pointer));
    return pointer;
  }
  static uint64_t hash(const SiteCounts& entry);
  void grow();

  LaunchCounts& counts_;
  std::vector<uint32_t> slots_;  // open addressing into counts_.sites
};

/// The accesses of one warp since its lanes last met. Lane accesses become warp requests by call site and by
/// how often the lane has been there, so that lanes which took another path, or fewer turns of a loop, do not
/// shift the others' requests.
class RequestLog {
 public:
  void add(uint32_t site, uint32_t lane, uint64_t address) {
    if (site >= sites_.size()) sites_.resize(site + 1);
    SiteLog& log = sites_[site];
    if (log.segment != segment_) log.restart(segment_);
    const uint32_t turn = log.turns[lane]++;
    if (turn == log.requests.size()) {
      if (used_ == requests_.size()) requests_.emplace_back();
      log.requests.push_back(used_);
      Request& request = requests_[used_++];
      request.site = site;
      request.lanes = 0;
    }
    Request& request = requests_[log.requests[turn]];
    request.lanes |= 1u << lane;
    request.addresses[lane] = address;
  }
  /// The lanes have met: counts what is open and forgets it.
  void flush(LaunchCounts& counts) {
    if (used_ != 0) count(counts);
  }
  void restart() {
    used_ = 0;
    ++segment_;
  }

 private:
  struct Request {
    uint32_t site;
    uint32_t lanes;
    uint64_t addresses[32];
  };
  struct SiteLog {
    uint64_t segment = 0;
    uint32_t turns[32] = {};
    std::vector<uint32_t> requests;
    void restart(uint64_t now) {
      segment = now;
      for (uint32_t& turn : turns) turn = 0;
      requests.clear();
    }
  };
  void count(LaunchCounts& counts);

  std::vector<SiteLog> sites_;
  std::vector<Request> requests_;
  uint32_t used_ = 0;
  uint64_t segment_ = 1;
};

}  // namespace simt
