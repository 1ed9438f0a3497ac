#include "watch.h"

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace cuda_host::watch {
namespace {

constexpr int kNobody = -1;

struct Access {
  int block = kNobody, thread = 0;
  unsigned block_epoch = 0, warp_epoch = 0;  // barriers passed
};

struct Cell {
  Access write, read, read_elsewhere;  // the latest; read_elsewhere in another warp than read
};

struct Range {
  const char* begin = nullptr;
  std::vector<Cell> cells;
  const char* name = "";
};

std::vector<Range> observed;
Range shared{nullptr, {}, "shared"};
int current_block = kNobody;
unsigned block_epoch = 0;
unsigned warp_epochs[1024];
int found = 0;
std::string first_message;

bool ordered(const Access& before, const Access& now) {
  if (before.block == kNobody) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
  return before.thread / 32 == now.thread / 32 && before.warp_epoch != now.warp_epoch;
}

void report(const Range& range, std::size_t offset, const char* what, const Access& before, const Access& now) {
  if (found++ > 0) return;
  char text[200];
  std::snprintf(text, sizeof(text),
                "%s memory, byte %zu: %s, block %d thread %d and block %d thread %d, no barrier between", range.name,
                offset, what, before.block, before.thread, now.block, now.thread);
  first_message = text;
}

void touch(Range& range, std::size_t offset, bool is_write, const Access& now) {
  Cell& cell = range.cells[offset];
  if (!ordered(cell.write, now))
    report(range, offset, is_write ? "write and write" : "write and read", cell.write, now);
  if (is_write) {
    for (const Access* reader : {&cell.read, &cell.read_elsewhere}) {
      if (!ordered(*reader, now)) report(range, offset, "read and write", *reader, now);
    }
    cell.write = now;
    return;
  }
  const bool same_warp = cell.read.block == now.block && cell.read.thread / 32 == now.thread / 32;
  if (cell.read.block != kNobody && !same_warp) cell.read_elsewhere = cell.read;
  cell.read = now;
}

void access(const void* at, std::size_t bytes, bool is_write) {
  if (current_block == kNobody) return;
  const auto visit = [&](Range& range) {
    const std::size_t offset = static_cast<const char*>(at) - range.begin;
    if (range.begin == nullptr || static_cast<const char*>(at) < range.begin || offset >= range.cells.size()) return;
    const unsigned thread = current_thread();
    const Access now{current_block, static_cast<int>(thread), block_epoch, warp_epochs[thread]};
    for (std::size_t i = 0; i < bytes && offset + i < range.cells.size(); ++i) touch(range, offset + i, is_write, now);
  };
  visit(shared);
  for (Range& range : observed) visit(range);
}

}  // namespace

void observe(const void* begin, std::size_t bytes) {
  observed.push_back({static_cast<const char*>(begin), std::vector<Cell>(bytes), "global"});
}
void forget() {
  observed.clear();
  found = 0;
  first_message.clear();
}
int conflicts() { return found; }
const char* message() { return first_message.c_str(); }

void read(const void* at, std::size_t bytes) { access(at, bytes, false); }
void write(const void* at, std::size_t bytes) { access(at, bytes, true); }

void launch_begins() {
  for (Range& range : observed) range.cells.assign(range.cells.size(), Cell());
}
void block_begins(unsigned block, const void* memory, std::size_t bytes) {
  shared.begin = static_cast<const char*>(memory);
  shared.cells.assign(bytes, Cell());
  block_epoch = 0;
  for (unsigned& epoch : warp_epochs) epoch = 0;
  current_block = static_cast<int>(block);
}
void block_ends() {
  current_block = kNobody;
  shared.begin = nullptr;
}
void passed_block_barrier() { ++block_epoch; }
void passed_warp_barrier(unsigned thread) { ++warp_epochs[thread]; }

}  // namespace cuda_host::watch

// What -fsanitize=thread makes the compiler call. The library of that name is not linked.
extern "C" {
#define MAMBAOUT_WATCH(size)                                                       \
  void __tsan_read##size(void* at) { cuda_host::watch::read(at, size); }           \
  void __tsan_write##size(void* at) { cuda_host::watch::write(at, size); }         \
  void __tsan_unaligned_read##size(void* at) { cuda_host::watch::read(at, size); } \
  void __tsan_unaligned_write##size(void* at) { cuda_host::watch::write(at, size); }
MAMBAOUT_WATCH(1)
MAMBAOUT_WATCH(2)
MAMBAOUT_WATCH(4)
MAMBAOUT_WATCH(8)
MAMBAOUT_WATCH(16)
#undef MAMBAOUT_WATCH
void __tsan_read_range(void* at, std::size_t bytes) { cuda_host::watch::read(at, bytes); }
void __tsan_write_range(void* at, std::size_t bytes) { cuda_host::watch::write(at, bytes); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
