// The simulated device's memory: counted as CUDACachingAllocator counts it, with host memory that is pinned, and pools
// whose pages can be taken away and given back, as vLLM's sleep mode does with CUDA's virtual memory. The allocator
// does not know of that: what sleeps is in use for it, and free.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "order.h"

namespace memory {

const c10::Device CPU(c10::DeviceType::CPU), GPU(c10::DeviceType::CUDA, 0);

inline std::atomic<int64_t> in_use{0}, peak{0}, asleep{0};

struct Block {
  c10::DataPtr bytes;
  int64_t size;
};

inline int64_t rounded(int64_t size) { return (size + 511) / 512 * 512; }  // as CUDACachingAllocator

inline void release(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use -= rounded(block->size);
  order::freed(block->bytes.get());
  delete block;
}

inline c10::DataPtr on_gpu(c10::DataPtr bytes, int64_t size) {
  int64_t now = in_use += rounded(size);
  for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {}
  void* data = bytes.get();
  order::allocated(data);
  return {data, new Block{std::move(bytes), size}, &release, GPU};
}

// --- pools ----------------------------------------------------------------------------------------------------------

struct Mapping {
  size_t size;
  std::string pool;
  bool is_asleep;
};

inline thread_local std::string pool;  // where this thread allocates; "" for none
inline std::mutex mappings_lock;
inline std::map<void*, Mapping> mappings;

inline size_t whole_pages(size_t size) { return (std::max<size_t>(size, 1) + 4095) / 4096 * 4096; }

inline void unmap(void* address) {
  std::lock_guard<std::mutex> guard(mappings_lock);
  auto found = mappings.find(address);
  if (found->second.is_asleep) asleep -= rounded(found->second.size);
  munmap(address, found->second.size);
  mappings.erase(found);
}

inline c10::DataPtr map(size_t size) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(address != MAP_FAILED, "no room for ", size, " bytes");
  std::lock_guard<std::mutex> guard(mappings_lock);
  mappings[address] = {size, pool, false};
  return {address, address, &unmap, CPU};
}

// Take the pages of a pool away (who touches them then gets a SIGSEGV), or give them back, full of NaN. Returns bytes.
inline int64_t set_asleep(const std::string& name, bool sleeps) {
  std::lock_guard<std::mutex> guard(mappings_lock);
  int64_t changed = 0;
  for (auto& [address, mapping] : mappings) {
    if (mapping.pool != name || mapping.is_asleep == sleeps) continue;
    if (sleeps) TORCH_CHECK(madvise(address, mapping.size, MADV_DONTNEED) == 0);
    TORCH_CHECK(mprotect(address, mapping.size, sleeps ? PROT_NONE : PROT_READ | PROT_WRITE) == 0);
    if (!sleeps) std::memset(address, 0xff, mapping.size);
    mapping.is_asleep = sleeps;
    changed += rounded(mapping.size);
  }
  asleep += sleeps ? changed : -changed;
  return changed;
}

inline int64_t pooled() {
  std::lock_guard<std::mutex> guard(mappings_lock);
  int64_t bytes = 0;
  for (auto& [address, mapping] : mappings) bytes += mapping.size;
  return bytes;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (pool.empty()) return on_gpu(c10::GetCPUAllocator()->allocate(size), size);
    return on_gpu(map(whole_pages(size)), whole_pages(size));
  }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
inline DeviceAllocator allocator;

// --- pinned memory --------------------------------------------------------------------------------------------------

inline std::mutex pins_lock;
inline std::map<const char*, size_t> pins;

inline void pin(int64_t address, int64_t size) {  // 0 to take it back
  std::lock_guard<std::mutex> guard(pins_lock);
  auto* begin = reinterpret_cast<const char*>(address);
  if (size > 0) pins[begin] = size;
  else pins.erase(begin);
}

inline bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> guard(pins_lock);
  auto* byte = static_cast<const char*>(address);
  auto next = pins.upper_bound(byte);
  if (next == pins.begin()) return false;
  auto& [begin, size] = *std::prev(next);
  return byte < begin + size;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* bytes = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size));
    pin(reinterpret_cast<int64_t>(bytes->get()), size);
    return {bytes->get(), bytes, &unpin, CPU};
  }
  static void unpin(void* context) {
    auto* bytes = static_cast<c10::DataPtr*>(context);
    {
      std::lock_guard<std::recursive_mutex> guard(order::lock);
      order::blocks.erase(bytes->get());  // torch's own allocator waits for streams before it gives pinned memory anew
    }
    pin(reinterpret_cast<int64_t>(bytes->get()), 0);
    delete bytes;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};
inline PinnedAllocator pinned_allocator;

}  // namespace memory
