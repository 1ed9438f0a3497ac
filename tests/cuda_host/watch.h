// Watches memory for races: two accesses to a byte, one of them a write, by threads that no barrier orders.
//
// Watched are the shared memory of every block, and the global ranges named by observe(), where also different blocks
// must not meet. Every access of a source file counts that is compiled with -fsanitize=thread (the compiler then calls
// __tsan_read4 and the like, which watch.cpp defines); asynchronous copies count in any case.
#pragma once

#include <cstddef>

namespace cuda_host {

unsigned current_thread();

namespace watch {

void observe(const void* begin, std::size_t bytes);
void forget();          // what was observed, and the conflicts
int conflicts();        // found since forget()
const char* message();  // of the first conflict

void read(const void* at, std::size_t bytes);
void write(const void* at, std::size_t bytes);

void launch_begins();
void block_begins(unsigned block, const void* shared, std::size_t bytes);
void block_ends();
void passed_block_barrier();
void passed_warp_barrier(unsigned thread);

}  // namespace watch
}  // namespace cuda_host
