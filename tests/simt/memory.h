// Global memory as kernels see it: buffers at addresses that cannot be dereferenced, each byte with a shadow.
//
// The kernels' pointers point into a reserved, inaccessible range of the address space. Every access has to
// go through the wrappers of simt.cuh, which translate it; a plain dereference faults and is reported. The
// data stay where the caller has them (a torch or numpy buffer): nothing is copied. Every storage starts at a
// multiple of 256 bytes of that range, as on a device, wherever the host has put it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fault.h"
#include "shadow.h"

namespace simt {

/// The reserved range: slots of 16 GiB. Slot 0 is shared memory, the others hold one storage each.
struct AddressSpace {
  static constexpr int kSlotShift = 34;
  static constexpr size_t kSlots = 128;
  static constexpr size_t kSlotBytes = size_t{1} << kSlotShift;
  // A storage starts this far into its slot, so that an access before its start is still recognised as its
  // own.
  static constexpr size_t kOrigin = size_t{1} << 32;
  static constexpr size_t kMaxStorage = size_t{1} << 33;

  static uintptr_t base;  // 0 until reserve()
  static void reserve();
  static uintptr_t slot_origin(size_t slot) { return base + slot * kSlotBytes + kOrigin; }
  static bool is_shared(uintptr_t address) { return address - base < kSlotBytes; }
  static bool contains(uintptr_t address) { return address - base < kSlots * kSlotBytes; }
};

enum class Role : uint8_t { kIn, kOut, kInOut };
enum class Access : uint8_t { kRead, kReadNc, kWrite, kAtomic };

/// A tensor of the caller: where its elements and its storage lie. Strides in elements.
struct TensorArg {
  uintptr_t data = 0;
  size_t itemsize = 1;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  uintptr_t storage = 0;
  size_t storage_bytes = 0;
  std::shared_ptr<void> owner;  // keeps the memory alive

  int64_t numel() const;
};

/// A tensor within a storage.
struct View {
  std::string name;
  Role role;
  size_t offset;  // of its first element, in bytes
  TensorArg tensor;

  /// Calls f(byte offset, bytes) for every contiguous run of elements, in row-major order.
  template <class F>
  void for_each_run(const F& f) const;
};

struct Storage {
  // Bits of a byte's state. Those of kLaunchBits are forgotten when a launch starts.
  static constexpr uint8_t kView = 1, kInit = 2, kWritable = 4, kWritten = 8;
  static constexpr uint8_t kReadNow = 16, kWrittenNow = 32, kReadNcNow = 64;
  static constexpr uint8_t kLaunchBits = kReadNow | kWrittenNow | kReadNcNow;

  uintptr_t host = 0;
  size_t bytes = 0;
  unsigned char* data = nullptr;
  Pages<uint8_t> state;
  bool writable = false;  // some view of it is: its accesses can race
  RaceShadow race;
  std::vector<View> views;
  std::unique_ptr<unsigned char[]> owned;  // scratch memory
  size_t touched_begin = 0, touched_end = 0;
};

class GlobalMemory {
 public:
  /// Makes the elements of a tensor accessible and returns the kernels' address of the first. kOut:
  /// uninitialised, filled with 0xFF bytes (NaN, -1). Tensors that share a storage may be added one after the
  /// other.
  void* add(const std::string& name, Role role, const TensorArg& tensor);
  /// Uninitialised memory that lives as long as this object; aligned to 256 bytes.
  void* add_scratch(const std::string& name, size_t bytes);

  void start_launch();
  /// Forgets all remembered accesses, once for every `generation` of block numbers.
  void clear_races(uint64_t generation);
  /// One byte per element of an added tensor, row-major: 1 where all its bytes were written by a kernel, else
  /// 0.
  std::string written(const std::string& name) const;
  /// Names of out tensors of which some element was never written, with the number of such elements.
  std::vector<std::pair<std::string, size_t>> unwritten() const;

  /// The storage whose slot holds the address, or nullptr; `offset` is relative to it and may be out of its
  /// bounds.
  Storage* find(uintptr_t address, int64_t& offset) const {
    const size_t slot = (address - AddressSpace::base) >> AddressSpace::kSlotShift;
    if (slot >= AddressSpace::kSlots) return nullptr;
    offset = static_cast<int64_t>(address - AddressSpace::slot_origin(slot));
    return slots_[slot];
  }
  /// Says what is wrong with an access that the state of the bytes does not allow. Throws a Fault.
  [[noreturn]] void report(const Storage& storage, int64_t offset, size_t size, Access access,
                           const Site& site) const;

 private:
  Storage& storage_for(const TensorArg& tensor, uintptr_t& device);
  Storage& new_storage(size_t& slot);
  const View& view(const std::string& name, const Storage** storage) const;

  std::array<Storage*, AddressSpace::kSlots> slots_{};
  std::vector<std::unique_ptr<Storage>> storages_;
  uint64_t race_generation_ = 0;
};

/// Name of an access in messages: "read", "write", "atomic".
const char* access_name(Access access);

}  // namespace simt
