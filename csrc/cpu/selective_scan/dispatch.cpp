// The selective scan: a call's tasks, and the sums over them.
#include <algorithm>

#include "../select_kernels.h"
#include "../simd/convert.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Offsets in floats into the workspace. What a slot has to itself comes once for each.
struct Layout {
  std::int64_t lanes, channel_tasks, slots, pitch, A_pitch, tiles;
  std::int64_t A, states, B_C, sums, starts, dB_dC, dB_part, dC_part, parameters;
  std::int64_t states_size, B_C_size, sums_size, starts_size, dB_dC_size, part_size, parameters_size;
  std::int64_t total;
};

Layout make_layout(const ScanCall& call, bool backward, int num_threads) {
  Layout at{};
  const std::int64_t lanes = at.lanes = select_kernels<ScanKernels>(call.dtype)->lanes;
  at.channel_tasks = ceil_div(call.D, kScanChannels);
  at.slots = std::min<std::int64_t>(num_threads, call.N * at.channel_tasks);
  at.pitch = ceil_div(std::min(call.D, kScanChannels), lanes) * lanes;
  at.A_pitch = ceil_div(call.D, lanes) * lanes;
  at.tiles = ceil_div(call.L, kScanSteps);
  const auto take = [&](std::int64_t* offset, std::int64_t* size, std::int64_t count, std::int64_t times) {
    *offset = at.total;
    *size = ceil_div(count, kLine / 4) * (kLine / 4);
    at.total += *size * times;
  };
  std::int64_t of_A;
  take(&at.A, &of_A, call.G * call.S * at.A_pitch, 1);
  take(&at.states, &at.states_size, call.S * at.pitch, at.slots);
  take(&at.B_C, &at.B_C_size, 2 * kScanSteps * call.S, at.slots);
  take(&at.sums, &at.sums_size, call.dtype == DType::kFloat32 ? 0 : call.L * at.pitch, at.slots);
  if (!backward) return at;
  take(&at.starts, &at.starts_size, at.tiles * call.S * at.pitch, at.slots);
  take(&at.dB_dC, &at.dB_dC_size, 2 * kScanSteps * call.S * lanes, at.slots);
  take(&at.dB_part, &at.part_size, call.G * call.L * call.S, call.N * at.channel_tasks);
  take(&at.dC_part, &at.part_size, call.G * call.L * call.S, call.N * at.channel_tasks);
  take(&at.parameters, &at.parameters_size, call.G * (call.S + 2) * at.A_pitch, call.N);
  return at;
}

std::int64_t workspace_bytes(const ScanCall& call, bool backward, int num_threads) {
  return make_layout(call, backward, num_threads).total * 4 + kLine;
}

// Calls kernel(task) for every task, all of its memory in place.
template <typename Kernel>
void run_scan_tasks(const ScanCall& call, const Layout& at, float* base, int num_threads, ParallelFor parallel_for,
                    const Kernel& kernel) {
  float* A = base + at.A;
  run_tasks(call.G * call.S, num_threads, parallel_for, [&](std::int64_t, std::int64_t row) {
    const std::int64_t g = row / call.S, s = row % call.S;
    for (std::int64_t c = 0; c < at.A_pitch; ++c) {
      A[row * at.A_pitch + c] = c < call.D ? call.A[(g * call.D + c) * call.S + s] : 0.0f;
    }
  });
  run_tasks(call.N * at.channel_tasks, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t index) {
    ScanTask task{};
    task.n = index / at.channel_tasks;
    task.begin = index % at.channel_tasks * kScanChannels;
    task.end = std::min(task.begin + kScanChannels, call.D);
    task.pitch = ceil_div(task.end - task.begin, at.lanes) * at.lanes;
    task.A = A;
    task.A_pitch = at.A_pitch;
    task.states = base + at.states + slot * at.states_size;
    task.B_C = base + at.B_C + slot * at.B_C_size;
    task.sums = call.dtype == DType::kFloat32 ? nullptr : base + at.sums + slot * at.sums_size;
    task.starts = base + at.starts + slot * at.starts_size;
    task.dB_dC = base + at.dB_dC + slot * at.dB_dC_size;
    task.dB_part = base + at.dB_part + index * at.part_size;
    task.dC_part = base + at.dC_part + index * at.part_size;
    task.parameters = base + at.parameters + task.n * at.parameters_size;
    kernel(task);
  });
}

}  // namespace

std::int64_t first_bad_order(const std::int32_t* order, std::int64_t G, std::int64_t L, std::int32_t* visited) {
  for (std::int64_t l = 0; l < L; ++l) visited[l] = 0;
  for (std::int64_t g = 0; g < G; ++g) {
    for (std::int64_t t = 0; t < L; ++t) {
      const std::int32_t token = order[g * L + t];
      if (token < 0 || token >= L || visited[token] == g + 1) return g;
      visited[token] = static_cast<std::int32_t>(g + 1);
    }
  }
  return -1;
}

std::int64_t selective_scan_workspace_bytes(const ScanCall& call, int num_threads) {
  return workspace_bytes(call, false, num_threads);
}
std::int64_t selective_scan_backward_workspace_bytes(const ScanCall& call, int num_threads) {
  return workspace_bytes(call, true, num_threads);
}

void selective_scan(const ScanForwardCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  const Layout at = make_layout(call, false, num_threads);
  const auto* kernels = select_kernels<ScanKernels>(call.dtype);
  run_scan_tasks(call, at, reinterpret_cast<float*>(align_up(workspace)), num_threads, parallel_for,
                 [&](const ScanTask& task) { kernels->forward(call, task); });
}

void selective_scan_backward(const ScanBackwardCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  const Layout at = make_layout(call, true, num_threads);
  float* base = reinterpret_cast<float*>(align_up(workspace));
  const auto* kernels = select_kernels<ScanKernels>(call.dtype);
  run_scan_tasks(call, at, base, num_threads, parallel_for,
                 [&](const ScanTask& task) { kernels->backward(call, task); });

  // Over the tasks of an image, in their order.
  const std::int64_t G = call.G, L = call.L, S = call.S, D = call.D;
  run_tasks(call.N * G, num_threads, parallel_for, [&](std::int64_t, std::int64_t map) {
    const std::int64_t n = map / G, g = map % G;
    with_element_type(call.dtype, [&](auto element) {
      for (const auto& [part, to] : {std::pair{at.dB_part, call.dB}, std::pair{at.dC_part, call.dC}}) {
        auto* rows = static_cast<decltype(element)*>(to) + map * L * S;
        for (std::int64_t i = 0; i < L * S; ++i) {
          float sum = 0.0f;
          for (std::int64_t task = 0; task < at.channel_tasks; ++task) {
            sum += base[part + (n * at.channel_tasks + task) * at.part_size + g * L * S + i];
          }
          narrow(sum, rows + i);
        }
      }
    });
  });
  // Over the images.
  run_tasks(G * (S + 2), num_threads, parallel_for, [&](std::int64_t, std::int64_t row) {
    const std::int64_t g = row / (S + 2), s = row % (S + 2);
    for (std::int64_t c = 0; c < D; ++c) {
      float sum = 0.0f;
      for (std::int64_t n = 0; n < call.N; ++n) {
        sum += base[at.parameters + n * at.parameters_size + row * at.A_pitch + c];
      }
      if (s < S) {
        call.dA[(g * D + c) * S + s] = sum;
      } else {
        (s == S ? call.dskip : call.ddelta_bias)[g * D + c] = sum;
      }
    }
  });
}

}  // namespace mambaout_kernels::cpu
