#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace simt {

namespace {
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type, -1 in integers
size_t next_slot = 0;                    // rotates, so that an old launch's pointer does not hit a new buffer
}  // namespace

uintptr_t AddressSpace::base = 0;

void AddressSpace::reserve() {
  if (base != 0) return;
  void* p =
      mmap(nullptr, (kSlots + 1) * kSlotBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    throw std::runtime_error("simt: 2 TiB of address space could not be reserved (is `ulimit -v` set?)");
  }
  base = (reinterpret_cast<uintptr_t>(p) + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
}

const char* access_name(Access access) {
  switch (access) {
    case Access::kRead: return "read";
    case Access::kReadNc: return "read through the read-only path";
    case Access::kWrite: return "write";
    case Access::kAtomic: return "atomic";
  }
  return "";
}

int64_t TensorArg::numel() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

template <class F>
void View::for_each_run(const F& f) const {
  const auto& shape = tensor.shape;
  const auto& strides = tensor.strides;
  if (tensor.numel() == 0) return;
  // Trailing dimensions that are contiguous make one run.
  size_t outer = shape.size();
  int64_t run = 1;
  while (outer > 0 && (shape[outer - 1] == 1 || strides[outer - 1] == run)) run *= shape[--outer];
  std::vector<int64_t> index(outer, 0);
  for (;;) {
    int64_t element = 0;
    for (size_t dim = 0; dim < outer; ++dim) element += index[dim] * strides[dim];
    f(offset + static_cast<size_t>(element) * tensor.itemsize, static_cast<size_t>(run) * tensor.itemsize);
    size_t dim = outer;
    while (dim > 0 && ++index[dim - 1] == shape[dim - 1]) index[--dim] = 0;
    if (dim == 0) return;
  }
}

Storage& GlobalMemory::new_storage(size_t& slot) {
  AddressSpace::reserve();
  for (size_t tries = 1; tries < AddressSpace::kSlots; ++tries) {
    slot = 1 + next_slot++ % (AddressSpace::kSlots - 1);
    if (slots_[slot] != nullptr) continue;
    storages_.push_back(std::make_unique<Storage>());
    slots_[slot] = storages_.back().get();
    return *slots_[slot];
  }
  throw std::runtime_error("simt: more than 127 storages in one session");
}

Storage& GlobalMemory::storage_for(const TensorArg& tensor, uintptr_t& device) {
  if (tensor.storage_bytes > AddressSpace::kMaxStorage)
    throw std::runtime_error("simt: a storage is over 8 GiB");
  for (size_t slot = 1; slot < AddressSpace::kSlots; ++slot) {
    Storage* storage = slots_[slot];
    if (storage == nullptr || storage->bytes == 0 || tensor.storage_bytes == 0) continue;
    if (storage->host == tensor.storage && storage->bytes == tensor.storage_bytes) {
      device = AddressSpace::slot_origin(slot);
      return *storage;
    }
    if (tensor.storage < storage->host + storage->bytes &&
        storage->host < tensor.storage + tensor.storage_bytes) {
      throw std::runtime_error("simt: two tensors overlap in memory but name different storages");
    }
  }
  size_t slot = 0;
  Storage& storage = new_storage(slot);
  storage.host = tensor.storage;
  storage.bytes = tensor.storage_bytes;
  storage.data = reinterpret_cast<unsigned char*>(tensor.storage);
  storage.state = Pages<uint8_t>(storage.bytes + 16);
  device = AddressSpace::slot_origin(slot);
  return storage;
}

void* GlobalMemory::add(const std::string& name, Role role, const TensorArg& tensor) {
  for (const auto& storage : storages_) {
    for (const View& other : storage->views) {
      if (other.name == name) throw std::runtime_error("simt: two tensors are named '" + name + "'");
    }
  }
  uintptr_t device = 0;
  Storage& storage = storage_for(tensor, device);
  const size_t offset = tensor.storage_bytes == 0 ? 0 : tensor.data - tensor.storage;
  storage.views.push_back({name, role, offset, tensor});
  const uint8_t bits = Storage::kView | (role != Role::kOut ? Storage::kInit : 0) |
                       (role != Role::kIn ? Storage::kWritable : 0);
  storage.views.back().for_each_run([&](size_t begin, size_t bytes) {
    if (begin > storage.bytes || bytes > storage.bytes - begin) {
      throw std::runtime_error("simt: '" + name + "' reaches out of its storage");
    }
    for (size_t i = begin; i < begin + bytes; ++i) {
      const uint8_t before = storage.state[i];
      if ((before & Storage::kView) != 0 && ((before | bits) & Storage::kWritable) != 0) {
        throw std::runtime_error("simt: '" + name +
                                 "' shares memory with another tensor, or with itself, and is written");
      }
    }
    for (size_t i = begin; i < begin + bytes; ++i) storage.state[i] |= bits;
    if (role == Role::kOut) std::memset(storage.data + begin, kPoison, bytes);
  });
  if (role != Role::kIn && !storage.writable) {
    storage.writable = true;
    storage.race = RaceShadow(storage.bytes);
  }
  return reinterpret_cast<void*>(device + offset);
}

void* GlobalMemory::add_scratch(const std::string& name, size_t bytes) {
  TensorArg tensor;
  auto memory = std::make_unique<unsigned char[]>(bytes + 1);
  tensor.data = tensor.storage = reinterpret_cast<uintptr_t>(memory.get());
  tensor.storage_bytes = bytes;
  tensor.shape = {static_cast<int64_t>(bytes)};
  tensor.strides = {1};
  std::memset(memory.get(), kPoison, bytes);
  // Not an output: nobody has to write all of it, so no view with that role is asked for it by unwritten().
  void* const device = add(name, Role::kOut, tensor);
  storages_.back()->owned = std::move(memory);
  return device;
}

void GlobalMemory::start_launch() {
  for (const auto& storage : storages_) {
    for (size_t i = storage->touched_begin; i < storage->touched_end; ++i)
      storage->state[i] &= ~Storage::kLaunchBits;
    storage->touched_begin = storage->bytes;
    storage->touched_end = 0;
  }
}

void GlobalMemory::clear_races(uint64_t generation) {
  if (generation == race_generation_) return;
  race_generation_ = generation;
  for (const auto& storage : storages_) storage->race.clear();
}

const View& GlobalMemory::view(const std::string& name, const Storage** found) const {
  for (const auto& storage : storages_) {
    for (const View& view : storage->views) {
      if (view.name != name) continue;
      *found = storage.get();
      return view;
    }
  }
  throw std::runtime_error("simt: no tensor is named '" + name + "'");
}

std::string GlobalMemory::written(const std::string& name) const {
  const Storage* storage = nullptr;
  const View& found = view(name, &storage);
  const size_t itemsize = found.tensor.itemsize;
  std::string elements;
  elements.reserve(static_cast<size_t>(found.tensor.numel()));
  found.for_each_run([&](size_t begin, size_t bytes) {
    for (size_t element = begin; element < begin + bytes; element += itemsize) {
      bool all = true;
      for (size_t i = 0; i < itemsize; ++i)
        all = all && (storage->state[element + i] & Storage::kWritten) != 0;
      elements.push_back(all ? 1 : 0);
    }
  });
  return elements;
}

std::vector<std::pair<std::string, size_t>> GlobalMemory::unwritten() const {
  std::vector<std::pair<std::string, size_t>> all;
  for (const auto& storage : storages_) {
    if (storage->owned != nullptr) continue;
    for (const View& view : storage->views) {
      if (view.role != Role::kOut) continue;
      const std::string elements = written(view.name);
      const auto count = static_cast<size_t>(std::count(elements.begin(), elements.end(), 0));
      if (count != 0) all.emplace_back(view.name, count);
    }
  }
  return all;
}

namespace {

std::string shape_text(const View& view) {
  std::string all = "[";
  for (size_t dim = 0; dim < view.tensor.shape.size(); ++dim) {
    all += (dim ? ", " : "") + std::to_string(view.tensor.shape[dim]);
  }
  return all + "]";
}

/// Describes where an address that belongs to no view lies in relation to one.
std::string position_text(const View& view, int64_t offset, size_t size) {
  int64_t begin = INT64_MAX;
  int64_t end = 0;
  view.for_each_run([&](size_t run, size_t bytes) {
    begin = std::min(begin, static_cast<int64_t>(run));
    end = std::max(end, static_cast<int64_t>(run + bytes));
  });
  const std::string name = "'" + view.name + "' " + shape_text(view);
  if (begin > end) return "of " + name + ", which is empty";
  if (offset >= end) return text(offset - end, " bytes past the end of ", name);
  if (offset + static_cast<int64_t>(size) <= begin)
    return text(begin - offset, " bytes before the start of ", name);
  if (offset < begin) return text("across the start of ", name);
  if (offset + static_cast<int64_t>(size) > end) return text("across the end of ", name);
  return text("between the rows of ", name, ", ", offset - begin, " bytes after its start");
}

}  // namespace

void GlobalMemory::report(const Storage& storage, int64_t offset, size_t size, Access access,
                          const Site& site) const {
  const std::string what = text(access_name(access), " of ", size, " bytes of global memory ");
  const int64_t end = offset + static_cast<int64_t>(size);
  bool outside = offset < 0 || end > static_cast<int64_t>(storage.bytes);
  for (int64_t i = offset; !outside && i < end; ++i) outside = (storage.state[i] & Storage::kView) == 0;
  if (outside) {
    std::string where;
    for (const View& view : storage.views)
      where += (where.empty() ? "" : "; ") + position_text(view, offset, size);
    fail("out-of-bounds", site, what + where);
  }
  uint8_t all = 0xFF;
  uint8_t any = 0;
  for (int64_t i = offset; i < end; ++i) all &= storage.state[i], any |= storage.state[i];
  std::string names;
  for (const View& view : storage.views) {
    bool inside = false;
    view.for_each_run([&](size_t run, size_t bytes) {
      inside = inside || (offset < static_cast<int64_t>(run + bytes) && end > static_cast<int64_t>(run));
    });
    if (inside) {
      names += text(names.empty() ? "" : ", ", "'", view.name, "' ", shape_text(view), " at byte ",
                    offset - static_cast<int64_t>(view.offset));
    }
  }
  if (access != Access::kWrite && (all & Storage::kInit) == 0) {
    fail("uninitialised", site, what + "that nobody has written: " + names);
  }
  if ((access == Access::kWrite || access == Access::kAtomic) && (all & Storage::kWritable) == 0) {
    fail("read-only", site, what + "that is an input: " + names);
  }
  if ((access == Access::kReadNc && (any & Storage::kWrittenNow) != 0) || (any & Storage::kReadNcNow) != 0) {
    fail("read-only-path", site,
         what + "that this launch reads through the read-only path and writes: " + names);
  }
  fail("internal", site, what + "is refused for no known reason: " + names);
}

}  // namespace simt
