// The selective scan, forward: some channels of an image. Needs exponentials.h and loops.h before it.
//
// Lanes are channels, and states stay in registers for the kScanSteps steps of a tile.
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

constexpr int kScanVectors = 4;  // of channels, side by side: exp is a long chain

template <typename Element>
inline const Element* scan_rows(const ScanView& view, std::int64_t n, std::int64_t g) {
  return static_cast<const Element*>(view.data) + n * view.stride_n + g * view.stride_g;
}

// One scan of a task, where its tokens are.
template <typename Element>
struct ScanPlace {
  ScanPlace(const ScanCall& call, const ScanTask& task, std::int64_t g)
      : order(call.order + g * call.L),
        x(scan_rows<Element>(call.x, task.n, call.shared ? 0 : g) + task.begin),
        delta(scan_rows<Element>(call.delta, task.n, g) + task.begin),
        B(scan_rows<Element>(call.B, task.n, g)),
        C(scan_rows<Element>(call.C, task.n, g)),
        skip(call.skip + g * call.D + task.begin),
        bias(call.delta_bias + g * call.D + task.begin),
        A(task.A + g * call.S * task.A_pitch + task.begin) {}

  const std::int32_t* order;
  const Element *x, *delta, *B, *C;
  const float *skip, *bias;
  const float* A;  // [S][A_pitch]
};

// A tile's rows in order, as fp32: to[kScanSteps][count].
template <typename Element>
inline void gather_rows(const Element* from, std::int64_t stride, const std::int32_t* tokens, std::int64_t steps,
                        std::int64_t count, float* to) {
  for (std::int64_t t = 0; t < steps; ++t) {
    const Element* row = from + tokens[t] * stride;
    for_each_vector<Vec::kLanes>(count, [&](std::int64_t i, int lanes) {
      store_lanes(to + t * count + i, load_lanes<Vec>(row + i, lanes), lanes);
    });
  }
}

// kCount vectors of channels at each step of a tile.
template <int kCount>
struct TileValues {
  static constexpr int kPitch = kCount * Vec::kLanes;
  [[gnu::always_inline]] VecArray<Vec, kCount> at(std::int64_t t) const {
    return load_array<kCount, Vec>(values + t * kPitch, Vec::kLanes);
  }
  [[gnu::always_inline]] void set(std::int64_t t, const VecArray<Vec, kCount>& value) {
    store_array(values + t * kPitch, value, Vec::kLanes);
  }
  alignas(64) float values[kScanSteps * kPitch];
};

// One state after the other through a tile: h [S] in and out, and C h added to out if kOutput. Vectors of channels, not
// states, go side by side: B and C are the same for them.
template <bool kOutput, int kCount>
inline void advance(std::int64_t steps, const TileValues<kCount>& step, const TileValues<kCount>& input, const float* A,
                    std::int64_t A_pitch, const float* B, const float* C, std::int64_t S, float* h,
                    std::int64_t h_pitch, TileValues<kCount>& out) {
  for (std::int64_t s = 0; s < S; ++s) {
    auto state = load_array<kCount, Vec>(h + s * h_pitch, Vec::kLanes);
    const auto rate = load_array<kCount, Vec>(A + s * A_pitch, Vec::kLanes);
    for (std::int64_t t = 0; t < steps; ++t) {
      state = fma(exp(step.at(t) * rate), state, input.at(t) * broadcast(B[t * S + s]));
      if constexpr (kOutput) out.set(t, fma(state, broadcast(C[t * S + s]), out.at(t)));
    }
    store_array(h + s * h_pitch, state, Vec::kLanes);
  }
}

// Rows of fp32 [tokens][pitch] that are added up over the scans or stored once.
struct SumRows {
  float* rows;
  std::int64_t pitch;
};

template <int kCount>
inline void put(const SumRows& to, bool add, std::int64_t token, std::int64_t c, int lanes,
                const VecArray<Vec, kCount>& value) {
  float* row = to.rows + token * to.pitch + c;
  store_array(row, add ? load_array<kCount, Vec>(row, lanes) + value : value, lanes);
}

// Where the sums of scan g are: in place, if that is fp32.
template <typename Element>
inline SumRows sum_rows(const ScanCall& call, const ScanTask& task, std::int64_t g, void* dense) {
  if (task.sums != nullptr) return {task.sums, task.pitch};
  const std::int64_t map = call.shared ? task.n : task.n * call.G + g;
  return {static_cast<float*>(dense) + map * call.L * call.D + task.begin, call.D};
}
// Rounds them to where they belong, once scan g was the last to add to them.
template <typename Element>
inline void finish_sums(const ScanCall& call, const ScanTask& task, std::int64_t g, void* dense) {
  if (task.sums == nullptr || (call.shared && g + 1 < call.G)) return;
  const std::int64_t map = call.shared ? task.n : task.n * call.G + g;
  Element* rows = static_cast<Element*>(dense) + map * call.L * call.D + task.begin;
  for (std::int64_t l = 0; l < call.L; ++l) {
    for_each_vector<Vec::kLanes>(task.end - task.begin, [&](std::int64_t c, int lanes) {
      store_lanes(rows + l * call.D + c, load(task.sums + l * task.pitch + c), lanes);
    });
  }
}

template <typename Element>
void scan_forward(const ScanForwardCall& call, const ScanTask& task) {
  const std::int64_t S = call.S;
  float *B = task.B_C, *C = task.B_C + kScanSteps * S;
  for (std::int64_t g = 0; g < call.G; ++g) {
    const ScanPlace<Element> at(call, task, g);
    const SumRows y = sum_rows<Element>(call, task, g, call.y);
    const bool add = call.shared && g > 0;
    for (std::int64_t i = 0; i < S * task.pitch; ++i) task.states[i] = 0.0f;
    for (std::int64_t first = 0; first < call.L; first += kScanSteps) {
      const std::int64_t steps = min(kScanSteps, call.L - first);
      const std::int32_t* tokens = at.order + first;
      gather_rows(at.B, call.B.stride_l, tokens, steps, S, B);
      gather_rows(at.C, call.C.stride_l, tokens, steps, S, C);
      for_each_vectors<Vec, kScanVectors>(task.end - task.begin, [&](std::int64_t c, auto count, int lanes) {
        constexpr int kCount = decltype(count)::value;
        TileValues<kCount> step, input, out;
        const auto skip = load_array<kCount, Vec>(at.skip + c, lanes),
                   bias = load_array<kCount, Vec>(at.bias + c, lanes);
        for (std::int64_t t = 0; t < steps; ++t) {
          const auto x = load_array<kCount, Vec>(at.x + tokens[t] * call.x.stride_l + c, lanes);
          const auto dt =
              softplus(load_array<kCount, Vec>(at.delta + tokens[t] * call.delta.stride_l + c, lanes) + bias);
          step.set(t, dt);
          input.set(t, dt * x);
          out.set(t, skip * x);
        }
        advance<true>(steps, step, input, at.A + c, task.A_pitch, B, C, S, task.states + c, task.pitch, out);
        for (std::int64_t t = 0; t < steps; ++t) put(y, add, tokens[t], c, lanes, out.at(t));
      });
    }
    finish_sums<Element>(call, task, g, call.y);
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
