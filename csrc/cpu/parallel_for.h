// The caller's threads.
#pragma once

#include <cstdint>

namespace mambaout_kernels::cpu {

// Runs body(context, begin, end) over a partition of [0, count) on the caller's thread pool.
using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
using ParallelFor = void (*)(std::int64_t count, RangeBody body, void* context);

}  // namespace mambaout_kernels::cpu
