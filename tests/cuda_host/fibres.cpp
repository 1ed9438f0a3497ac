// The scheduler of shim.h: every CUDA thread of a block is a fibre that runs until it ends or waits at a barrier.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "shim.h"
#include "watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, total;
};

// Where a fibre or the scheduler goes on. ucontext begins one; then it is jumped to, where that can be done:
// swapcontext asks the kernel for the signal mask each time, and AddressSanitizer knows of no jump to another stack.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
};

struct Fibre {
  Place place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* sanitizer_stack = nullptr;
  uint3 index;
  unsigned linear;
  bool done;
  bool at_block_barrier, at_warp_barrier;
  std::vector<std::vector<Copy>> groups;  // of copies, the last one open
};

struct Block {
  std::vector<Fibre> fibres;
  unsigned threads = 0;
  Fibre* current = nullptr;
  const std::function<void()>* body = nullptr;
  uint3 index{};
  dim3 size;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  Place scheduler;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  std::size_t scheduler_size = 0;
} block;

void land(const Copy& copy) {
  watch::read(copy.from, copy.bytes);
  watch::write(copy.to, copy.total);
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.total - copy.bytes);
}

void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  from.begun = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.begun) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

void leave_fibre(bool for_ever) {
  Fibre& fibre = *block.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fibre.sanitizer_stack, block.scheduler_bottom,
                                 block.scheduler_size);
#endif
  (void)for_ever;
  go(fibre.place, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.sanitizer_stack, &block.scheduler_bottom, &block.scheduler_size);
#endif
}

void enter_fibre(Fibre& fibre) {
  block.current = &fibre;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_stack, fibre.stack.get(), kStackBytes);
#endif
  go(block.scheduler, fibre.place);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_stack, nullptr, nullptr);
#endif
}

void run_fibre() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  (*block.body)();
  if (block.current->groups.size() > 1) wait_copies(0);
  block.current->done = true;
  leave_fibre(true);
}

void start_fibre(unsigned linear) {
  Fibre& fibre = block.fibres[linear];
  fibre.linear = linear;
  fibre.index = {linear, 0, 0};
  fibre.done = fibre.at_block_barrier = fibre.at_warp_barrier = false;
  fibre.groups.assign(1, {});
  ucontext_t& context = fibre.place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fibre, 0);
  fibre.place.begun = false;
}

// Threads that have ended count as having arrived, as on a device.
void release_barriers() {
  bool block_complete = true, any_at_block = false;
  for (unsigned warp = 0; warp < block.threads; warp += kWarp) {
    bool complete = true, any = false;
    for (unsigned i = warp; i < std::min(warp + kWarp, block.threads); ++i) {
      const Fibre& fibre = block.fibres[i];
      any |= fibre.at_warp_barrier;
      complete &= fibre.done || fibre.at_warp_barrier;
      any_at_block |= fibre.at_block_barrier;
      block_complete &= fibre.done || fibre.at_block_barrier;
    }
    if (any && complete) {
      for (unsigned i = warp; i < std::min(warp + kWarp, block.threads); ++i) {
        block.fibres[i].at_warp_barrier = false;
        watch::passed_warp_barrier(i);
      }
    }
  }
  if (any_at_block && block_complete) {
    for (unsigned i = 0; i < block.threads; ++i) block.fibres[i].at_block_barrier = false;
    watch::passed_block_barrier();
  }
}

void run_block(const std::vector<unsigned>& order) {
  for (unsigned i = 0; i < block.threads; ++i) start_fibre(i);
  for (;;) {
    bool ran = false, left = false;
    for (const unsigned i : order) {
      Fibre& fibre = block.fibres[i];
      if (fibre.done) continue;
      left = true;
      if (fibre.at_block_barrier || fibre.at_warp_barrier) continue;
      enter_fibre(fibre);
      ran = true;
    }
    if (!left) return;
    if (!ran) fail("threads wait at different barriers for ever");
    release_barriers();
  }
}

}  // namespace

Behaviour& behaviour() {
  static Behaviour chosen;
  return chosen;
}
uint3& thread_index() { return block.current->index; }
uint3& block_index() { return block.index; }
dim3& block_size() { return block.size; }
unsigned char* shared_memory() { return block.shared; }
unsigned current_thread() { return block.current ? block.current->linear : 0; }

void sync_block() {
  block.current->at_block_barrier = true;
  leave_fibre(false);
}
void sync_warp() {
  block.current->at_warp_barrier = true;
  leave_fibre(false);
}

void start_copy(void* to, const void* from, std::size_t bytes, std::size_t total) {
  const Copy copy{to, from, bytes, total};
  if (behaviour().copies_land_late) {
    block.current->groups.back().push_back(copy);
  } else {
    land(copy);
  }
}
void commit_copies() { block.current->groups.emplace_back(); }
void wait_copies(int pending) {
  auto& groups = block.current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

void launch(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body) {
  if (threads == 0 || threads > 1024) fail("bad number of threads");
  if (block.fibres.size() < threads) block.fibres.resize(threads);
  block.threads = threads;
  block.size = dim3(threads, 1, 1);
  block.body = &body;
  block.shared_bytes = shared_bytes;
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 random(1);
  if (behaviour().order == Order::kReverse) std::reverse(order.begin(), order.end());
  watch::launch_begins();
  const unsigned wanted = behaviour().last_blocks;
  const unsigned first = wanted > 0 && wanted < blocks ? blocks - wanted : 0;
  for (unsigned i = first; i < blocks; ++i) {
    const unsigned index = behaviour().order == Order::kForward ? i : blocks - 1 - (i - first);
    block.index = {index, 0, 0};
    if (posix_memalign(reinterpret_cast<void**>(&block.shared), 16, std::max<std::size_t>(shared_bytes, 1)) != 0) {
      fail("out of memory");
    }
    std::memset(block.shared, 0xff, shared_bytes);
    if (behaviour().order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    watch::block_begins(index, block.shared, shared_bytes);
    run_block(order);
    watch::block_ends();
    std::free(block.shared);
    block.shared = nullptr;
  }
}

}  // namespace cuda_host
