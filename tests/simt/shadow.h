// Race detection: what is remembered of every byte of global and shared memory, and when two accesses
// conflict.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace simt {

/// Zeroed memory that costs nothing until it is touched, so that a shadow of gigabytes is possible.
template <class T>
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t count) : bytes_(count * sizeof(T)) {
    if (bytes_ == 0) return;
    void* p =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("simt: no address space for a shadow");
    data_ = static_cast<T*>(p);
  }
  Pages(Pages&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  void clear() {
    if (data_ != nullptr) madvise(data_, bytes_, MADV_DONTNEED);
  }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

/// One remembered access: which block (a number that is never used twice), thread, call site, and that
/// thread's clock. A thread's clock ticks at every barrier that it takes part in. 0 is nobody.
struct Record {
  static constexpr int kClockBits = 20;
  static constexpr int kSiteShift = kClockBits + 1;
  static constexpr int kThreadShift = kSiteShift + 9;
  static constexpr int kBlockShift = kThreadShift + 10;
  static constexpr uint64_t kAtomic = uint64_t{1} << kClockBits;
  static constexpr uint64_t kMaxClock = kAtomic - 1;
  static constexpr uint64_t kMaxSite = 510;  // kMaxSite + 1 stands for all further ones
  static constexpr uint64_t kMaxBlock = (uint64_t{1} << (64 - kBlockShift)) - 1;

  static uint64_t pack(uint64_t block, uint64_t thread, uint64_t site, uint64_t clock) {
    return block << kBlockShift | thread << kThreadShift |
           (site < kMaxSite ? site : kMaxSite + 1) << kSiteShift | clock;
  }
  static uint64_t block(uint64_t record) { return record >> kBlockShift; }
  static unsigned thread(uint64_t record) { return record >> kThreadShift & 1023; }
  static unsigned site(uint64_t record) { return record >> kSiteShift & 511; }
  static uint64_t clock(uint64_t record) { return record & kMaxClock; }
  static bool atomic(uint64_t record) { return (record & kAtomic) != 0; }
  static uint64_t warp(uint64_t record) { return record >> (kThreadShift + 5); }
};

/// Effect of an access on the bytes.
enum class Use : uint8_t { kRead, kWrite, kAtomic };

struct Conflict {
  uint64_t other = 0;  // record of the earlier access, 0 where there is no conflict
  Use other_use = Use::kRead;
};

/// The last write of some bytes and up to two accesses since that may happen side by side (reads, atomics).
///
/// Two are enough: a third concurrent one is dropped only when the two are in different warps, or all are in
/// one; whoever conflicts with the dropped one then conflicts with one that is kept, save after a partial
/// __syncwarp among the kept.
struct Cell {
  uint64_t writer;
  uint64_t shared[2];

  /// `happened_before(record)`: that access is ordered before what the running thread does now, or is its
  /// own.
  template <class Order>
  Conflict access(uint64_t me, Use use, const Order& happened_before) {
    if (writer != 0 && !happened_before(writer)) return {writer, Use::kWrite};
    if (use == Use::kAtomic) me |= Record::kAtomic;
    bool concurrent[2];
    for (int i = 0; i < 2; ++i) {
      concurrent[i] = shared[i] != 0 && !happened_before(shared[i]);
      if (!concurrent[i]) continue;
      const Use other = Record::atomic(shared[i]) ? Use::kAtomic : Use::kRead;
      if (use == Use::kWrite || use != other) return {shared[i], other};
    }
    if (use == Use::kWrite) {
      *this = {me, {0, 0}};
    } else if (!concurrent[0]) {
      shared[0] = me;
    } else if (!concurrent[1]) {
      shared[1] = me;
    } else if (Record::warp(shared[0]) == Record::warp(shared[1])) {
      shared[1] = me;
    }
    return {};
  }
};

/// Cells for a range of memory: one for every aligned word of 4 bytes, and one for every byte of those words
/// that were accessed in parts.
class RaceShadow {
 public:
  RaceShadow() = default;
  explicit RaceShadow(size_t bytes) : words_(bytes / 4 + 2), bytes_(bytes + 8), split_(bytes / 4 + 2) {}

  template <class Order>
  Conflict access(size_t offset, size_t size, uint64_t me, Use use, const Order& order) {
    const size_t end = offset + size;
    while (offset < end) {
      const size_t word = offset / 4;
      const size_t word_end = word * 4 + 4;
      const bool whole = offset % 4 == 0 && end >= word_end;
      if (whole && split_[word] == 0) {
        const Conflict conflict = words_[word].access(me, use, order);
        if (conflict.other != 0) return conflict;
      } else {
        if (split_[word] == 0) {
          for (size_t i = word * 4; i < word_end; ++i) bytes_[i] = words_[word];
          split_[word] = 1;
        }
        for (size_t i = offset; i < word_end && i < end; ++i) {
          const Conflict conflict = bytes_[i].access(me, use, order);
          if (conflict.other != 0) return conflict;
        }
        if (whole && use == Use::kWrite) {  // the four bytes agree again
          words_[word] = bytes_[offset];
          split_[word] = 0;
        }
      }
      offset = word_end;
    }
    return {};
  }

  void clear() {
    words_.clear();
    bytes_.clear();
    split_.clear();
  }

 private:
  Pages<Cell> words_;
  Pages<Cell> bytes_;
  Pages<uint8_t> split_;
};

}  // namespace simt
