// Runs the tasks of a call on the caller's threads. For the dispatchers only: it has inline functions, which the
// translation units of different instruction sets must not share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "parallel_for.h"

namespace mambaout_kernels::cpu {

constexpr std::int64_t kLine = 64;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t align_up(std::int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }
inline char* align_up(void* p) {
  return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(p) + kLine - 1) / kLine * kLine);
}

// [0, count) in `parts` parts whose sizes differ by one at most.
inline std::int64_t part_begin(std::int64_t count, std::int64_t parts, std::int64_t i) { return count * i / parts; }

// Runs body(slot, task) for every task. A slot belongs to one thread at a time, and begins with its own share of the
// tasks: the same rows of an image go to the same thread from call to call, whose caches may still hold them. Then it
// takes tasks that others have not begun.
template <typename Body>
void run_tasks(std::int64_t tasks, int num_threads, ParallelFor parallel_for, const Body& body) {
  if (tasks == 0) return;
  const std::int64_t slots = std::min<std::int64_t>(num_threads, tasks);
  if (slots == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(0, task);
    return;
  }
  struct alignas(kLine) Share {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };
  struct Context {
    std::vector<Share> shares;
    const Body& body;
  } context{std::vector<Share>(slots), body};
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    context.shares[slot].next.store(part_begin(tasks, slots, slot), std::memory_order_relaxed);
    context.shares[slot].end = part_begin(tasks, slots, slot + 1);
  }
  parallel_for(
      slots,
      [](void* opaque, std::int64_t begin, std::int64_t end) {
        auto& c = *static_cast<Context*>(opaque);
        const auto slots = static_cast<std::int64_t>(c.shares.size());
        for (std::int64_t slot = begin; slot < end; ++slot) {
          for (std::int64_t i = 0; i < slots; ++i) {
            Share& share = c.shares[(slot + i) % slots];
            for (std::int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
              c.body(slot, task);
            }
          }
        }
      },
      &context);
}

}  // namespace mambaout_kernels::cpu
