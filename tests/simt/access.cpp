// Accesses to memory: every check, the race detection, and the counting.
#include <algorithm>
#include <cstring>

#include "executor.h"

namespace simt {

namespace {

Kind kind_of(Access access) {
  return access == Access::kWrite ? Kind::kWrite : access == Access::kAtomic ? Kind::kAtomic : Kind::kRead;
}
Use use_of(Access access) {
  return access == Access::kWrite ? Use::kWrite : access == Access::kAtomic ? Use::kAtomic : Use::kRead;
}
const char* did(Use use) {
  return use == Use::kRead ? "read" : use == Use::kWrite ? "wrote" : "updated atomically";
}
const char* does(Use use) {
  return use == Use::kRead ? "reads" : use == Use::kWrite ? "writes" : "updates atomically";
}

constexpr uint64_t each_byte(uint8_t value) { return value * 0x0101010101010101u; }

}  // namespace

void Executor::count_access(const Site& site) {
  if (++accesses_ > config_.max_accesses) {
    fail("no-progress", site,
         text("the launch made more than ", config_.max_accesses,
              " accesses: does a thread wait for another?"));
  }
}

uint64_t Executor::record(uint32_t site_id) const {
  const Thread& me = *static_cast<const Thread*>(self);
  return Record::pack(block_number_, me.id, site_id, me.clock);
}

/// Returns whether an access of this block is ordered before what the running thread does now.
bool Executor::in_block_order(uint64_t record) const {
  const Thread& me = *static_cast<const Thread*>(self);
  const Thread& other = threads_[Record::thread(record)];
  const uint64_t clock = Record::clock(record);
  return &other == &me || clock < other.barrier_clock ||
         (other.warp == me.warp && clock < me.warp->seen[me.lane][other.lane]);
}

void Executor::report_race(const char* space, const std::string& where, Use use, size_t size,
                           const Conflict& conflict, const Site& site) const {
  const uint64_t other = conflict.other;
  const unsigned id = Record::site(other);
  const std::string other_site =
      id < counts_->sites.size() ? " at " + site_text(counts_->sites[id].site) : std::string();
  const uint64_t block = Record::block(other);
  const std::string who = block == block_number_
                              ? thread_text(threads_[Record::thread(other)])
                              : text("thread number ", Record::thread(other), " of another block (the ",
                                     block - first_block_number_ + 1, ". that ran)");
  fail(block == block_number_ ? "race" : "race-between-blocks", site,
       text("a thread ", does(use), " ", size, " bytes of ", space, " memory, ", where, ", that ", who, " ",
            did(conflict.other_use), other_site, " with nothing in between that orders the two"));
}

void* Executor::global_access(uintptr_t address, size_t size, Access access, const Site& site) {
  Thread& me = *static_cast<Thread*>(self);
  me.site = site;
  count_access(site);
  if (address % size != 0) {
    fail("misaligned", site,
         text(access_name(access), " of ", size, " bytes of global memory at an address that is ",
              address % size, " bytes past a multiple of ", size));
  }
  int64_t offset = 0;
  Storage* const storage = memory_->find(address, offset);
  if (storage == nullptr) {
    fail("out-of-bounds", site,
         text(access_name(access), " of ", size, " bytes at an address that is not in global memory",
              address < 65536 ? ": a null pointer" : ""));
  }
  if (offset < 0 || static_cast<uint64_t>(offset) + size > storage->bytes)
    memory_->report(*storage, offset, size, access, site);
  const uint32_t site_id = sites_->id(site, Space::kGlobal, kind_of(access), static_cast<uint32_t>(size));
  if (config_.detect) {
    constexpr uint8_t kNeeded[] = {Storage::kView | Storage::kInit, Storage::kView | Storage::kInit,
                                   Storage::kView | Storage::kWritable,
                                   Storage::kView | Storage::kInit | Storage::kWritable};
    constexpr uint8_t kForbidden[] = {0, Storage::kWrittenNow, Storage::kReadNcNow, Storage::kReadNcNow};
    constexpr uint8_t kWrites = Storage::kInit | Storage::kWritten | Storage::kWrittenNow;
    constexpr uint8_t kSets[] = {Storage::kReadNow, Storage::kReadNow | Storage::kReadNcNow, kWrites,
                                 kWrites | Storage::kReadNow};
    const auto which = static_cast<size_t>(access);
    uint8_t* const state = &storage->state[static_cast<size_t>(offset)];
    for (size_t i = 0; i < size; i += 8) {
      const size_t bytes = std::min<size_t>(size, 8);
      const uint64_t covered = bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1;
      uint64_t now;
      std::memcpy(&now, state + i, 8);  // the shadow is longer than the storage
      const uint64_t needed = each_byte(kNeeded[which]) & covered;
      if ((now & needed) != needed || (now & each_byte(kForbidden[which]) & covered) != 0) {
        memory_->report(*storage, offset, size, access, site);
      }
      const uint64_t fresh = ~now & covered & each_byte(kSets[which]);
      counts_->unique_bytes_read +=
          static_cast<uint64_t>(__builtin_popcountll(fresh & each_byte(Storage::kReadNow)));
      counts_->unique_bytes_written +=
          static_cast<uint64_t>(__builtin_popcountll(fresh & each_byte(Storage::kWrittenNow)));
      now |= fresh;
      std::memcpy(state + i, &now, 8);
    }
    storage->touched_begin = std::min(storage->touched_begin, static_cast<size_t>(offset));
    storage->touched_end = std::max(storage->touched_end, static_cast<size_t>(offset) + size);
    if (storage->writable) {
      const auto ordered = [this](uint64_t earlier) {
        const uint64_t block = Record::block(earlier);
        if (block == block_number_) return in_block_order(earlier);
        return block < first_block_number_ || !config_.races_between_blocks;
      };
      const Use use = use_of(access);
      const Conflict conflict =
          storage->race.access(static_cast<size_t>(offset), size, record(site_id), use, ordered);
      if (conflict.other != 0) {
        std::string names;
        for (const View& view : storage->views) {
          names += text(names.empty() ? "'" : ", '", view.name, "' at byte ",
                        offset - static_cast<int64_t>(view.offset));
        }
        report_race("global", names, use, size, conflict, site);
      }
    }
  }
  if (config_.count) me.warp->log.add(site_id, me.lane, address);
  return storage->data + offset;
}

// ---- Shared memory ----

void Executor::reset_shared() {
  constexpr unsigned char kPoison = 0xCB;
  const auto reset = [this](size_t offset, size_t bytes) {
    std::memset(&shared_state_[offset], kUninitialised, bytes);
    std::memset(&shared_data_[offset], kPoison, bytes);
  };
  if (dynamic_end_ > launch_->shared_bytes) std::memset(shared_state_.data(), kAbsent, dynamic_end_);
  dynamic_end_ = launch_->shared_bytes;
  reset(0, dynamic_end_);
  for (const auto& [key, variable] : static_variables_) reset(variable.offset, variable.bytes);
}

void* Executor::dynamic_shared(const Site& site) {
  if (launch_->shared_bytes == 0) {
    fail("out-of-bounds", site, "dynamic shared memory is used by a launch that asks for none");
  }
  return reinterpret_cast<void*>(AddressSpace::slot_origin(0));
}

void* Executor::static_shared(const void* key, const char* name, size_t bytes, size_t alignment,
                              const Site& site) {
  auto found = static_variables_.find(key);
  if (found == static_variables_.end()) {
    // No more aligned than its type asks, so that code which needs more than it declares is found; with room
    // around it.
    size_t offset = (static_end_ + 255) / 256 * 256 + 256;
    if (alignment < 16) offset += alignment;
    static_end_ = offset + bytes;
    static_bytes_ += bytes;
    if (static_bytes_ > kMaxStaticBytes || static_bytes_ + launch_->shared_bytes > kMaxSharedBytes ||
        static_end_ > kSharedBytes) {
      fail("bad-launch", site,
           text("too much shared memory: ", static_bytes_, " bytes static (at most ", kMaxStaticBytes, "), ",
                launch_->shared_bytes, " dynamic, at most ", kMaxSharedBytes, " in all"));
    }
    found = static_variables_.emplace(key, StaticVariable{name, offset, bytes}).first;
    std::memset(&shared_state_[offset], kUninitialised, bytes);
    std::memset(&shared_data_[offset], 0xCB, bytes);
  }
  return reinterpret_cast<void*>(AddressSpace::slot_origin(0) + found->second.offset);
}

std::string Executor::shared_text(size_t offset) const {
  if (offset < kStaticOrigin)
    return text("byte ", offset, " of the dynamic shared memory of ", launch_->shared_bytes, " bytes");
  const StaticVariable* nearest = nullptr;
  for (const auto& [key, variable] : static_variables_) {
    if (variable.offset <= offset + 255 && (nearest == nullptr || variable.offset > nearest->offset))
      nearest = &variable;
  }
  if (nearest == nullptr) return "outside every static variable";
  return text("byte ", static_cast<int64_t>(offset) - static_cast<int64_t>(nearest->offset), " of '",
              nearest->name, "' of ", nearest->bytes, " bytes");
}

void Executor::report_shared(size_t offset, size_t size, Access access, const Site& site) const {
  const std::string what =
      text(access_name(access), " of ", size, " bytes of shared memory, ", shared_text(offset));
  const uint8_t* const state = &shared_state_[offset];
  if (std::find(state, state + size, kAbsent) != state + size) fail("out-of-bounds", site, what);
  fail("uninitialised", site, what + ", which nobody has written in this block");
}

void Executor::record_shared(size_t offset, size_t size, Use use, uint32_t site_id, const Site& site) {
  const auto ordered = [this](uint64_t earlier) {
    return Record::block(earlier) != block_number_ || in_block_order(earlier);
  };
  const Conflict conflict = shared_race_.access(offset, size, record(site_id), use, ordered);
  if (conflict.other != 0) report_race("shared", shared_text(offset), use, size, conflict, site);
}

void* Executor::shared_access(uintptr_t address, size_t size, Access access, const Site& site) {
  Thread& me = *static_cast<Thread*>(self);
  me.site = site;
  count_access(site);
  if (address % size != 0) {
    fail("misaligned", site,
         text(access_name(access), " of ", size, " bytes of shared memory at an address that is ",
              address % size, " bytes past a multiple of ", size));
  }
  const size_t offset = address - AddressSpace::slot_origin(0);
  if (offset >= kSharedBytes) {
    fail("out-of-bounds", site,
         AddressSpace::is_shared(address)
             ? text(access_name(access), " of ", size, " bytes of shared memory, at byte ",
                    static_cast<int64_t>(offset))
             : text(access_name(access), " of ", size, " bytes at an address that is not in shared memory"));
  }
  uint8_t* const state = &shared_state_[offset];
  uint8_t lowest = kInitialised;
  for (size_t i = 0; i < size; ++i) lowest = std::min(lowest, state[i]);
  if (lowest == kAbsent || (config_.detect && access != Access::kWrite && lowest != kInitialised)) {
    report_shared(offset, size, access, site);
  }
  const uint32_t site_id = sites_->id(site, Space::kShared, kind_of(access), static_cast<uint32_t>(size));
  if (config_.detect) {
    record_shared(offset, size, use_of(access), site_id, site);
    if (access == Access::kWrite) std::memset(state, kInitialised, size);
  }
  if (config_.count) me.warp->log.add(site_id, me.lane, offset);
  return &shared_data_[offset];
}

}  // namespace simt
