// Which accesses to memory are ordered: host and streams have vector clocks (Lamport, Mattern), as in a race detector.
// The host is one agent, whatever the thread: that a thread has waited for another is taken for granted.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace order {

constexpr int HOST = 0;  // the agents are the host, whatever the thread, and streams 1, 2, ...; 1 is the default one
using Clock = std::map<int, int64_t>;

struct Accesses {
  int stream = 1;  // that allocated the block: where the allocator may hand it out again as soon as it is freed
  std::pair<int, int64_t> write{-1, 0};
  std::string writer;
  std::map<int, int64_t> reads;
};

inline std::recursive_mutex lock;
inline std::atomic<bool> watching = false;
inline thread_local int stream = 1;
inline thread_local bool in_kernel = false;  // copies stand in for a kernel's own accesses: the host waits for none
inline std::map<int, Clock> clocks;
inline std::map<int64_t, Clock> events;
inline std::map<const void*, Accesses> blocks;  // by the address of their bytes
inline std::set<std::string> faults;

inline int64_t at(const Clock& clock, int agent) {
  auto found = clock.find(agent);
  return found == clock.end() ? 0 : found->second;
}

inline void merge(Clock& into, const Clock& from) {
  for (auto& [agent, time] : from) into[agent] = std::max(into[agent], time);
}

inline std::string name(int agent) { return agent == HOST ? "the host" : "stream " + std::to_string(agent); }

inline void touch(const void* bytes, int agent, bool write, const std::string& what) {
  auto& block = blocks[bytes];
  auto& clock = clocks[agent];
  auto [writer, time] = block.write;
  if (writer >= 0 && writer != agent && at(clock, writer) < time)
    faults.insert(what + " on " + name(agent) + " does not wait for " + block.writer + " on " + name(writer));
  if (!write) {
    block.reads[agent] = at(clock, agent);
    return;
  }
  for (auto& [reader, read] : block.reads)
    if (reader != agent && at(clock, reader) < read)
      faults.insert(what + " on " + name(agent) + " overwrites what " + name(reader) + " may still read");
  block.write = {agent, at(clock, agent)};
  block.writer = what;
  block.reads.clear();
}

inline void tick(int agent) {  // something begins there that the host has asked for
  ++clocks[HOST][HOST];
  merge(clocks[agent], clocks[HOST]);
  ++clocks[agent][agent];
}

inline void allocated(const void* bytes) {
  if (!watching || bytes == nullptr) return;
  std::lock_guard<std::recursive_mutex> guard(lock);
  blocks.erase(bytes);
  blocks[bytes].stream = stream;
  tick(stream);
  touch(bytes, stream, true, "whatever had the block before");
}

inline void freed(const void* bytes) {
  if (!watching) return;
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto found = blocks.find(bytes);
  if (found == blocks.end()) return;
  auto& block = found->second;
  Clock known = clocks[block.stream];
  merge(known, clocks[HOST]);
  auto last = block.reads;
  if (block.write.first > HOST) last[block.write.first] = std::max(last[block.write.first], block.write.second);
  for (auto& [agent, time] : last)
    if (agent > HOST && agent != block.stream && at(known, agent) < time)
      faults.insert("a block is freed while " + name(agent) + " may still use it, after " + block.writer);
  blocks.erase(found);
}

}  // namespace order
