// The selective scan, backward: some channels of an image. Needs body.h before it.
//
// The states before each tile are computed first, then tiles from the last to the first: of each, its states, and then
//   dh_t = C_t dy_t + a_{t+1} dh_{t+1},   a_t = exp(step_t A)
//   dC_t = dy_t h_t,  dB_t = dh_t step_t x_t   (sums over channels)
//   d(step_t A) = dh_t a_t h_{t-1},   d(step_t x_t) = dh_t B_t
#pragma once

#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// What a tile's channels have, and what is found for them.
template <int kCount>
struct BackwardTile {
  TileValues<kCount> x, step, input, dy, drate, dinput;  // drate: of step, through step A
};

// Sums are of a tile first: the rounding error of a long one would grow with the sequence.
template <int kCount>
inline void add_to(float* sums, const VecArray<Vec, kCount>& of_tile) {
  store_array(sums, load_array<kCount, Vec>(sums, Vec::kLanes) + of_tile, Vec::kLanes);
}

// One state of a tile. start: h before it; carry: a_{t+1} dh_{t+1} of the tile after it, in and out. B, C, dB and dC
// have S of it for each step.
template <int kCount>
inline void state_backward(std::int64_t steps, BackwardTile<kCount>& tile, const float* A, const float* B,
                           const float* C, std::int64_t S, const float* start, float* carry, float* dA, float* dB,
                           float* dC) {
  TileValues<kCount> decay, before;
  auto state = load_array<kCount, Vec>(start, Vec::kLanes);
  const auto rate = load_array<kCount, Vec>(A, Vec::kLanes);
  for (std::int64_t t = 0; t < steps; ++t) {
    const auto a = exp(tile.step.at(t) * rate);
    decay.set(t, a);
    before.set(t, state);
    state = fma(a, state, tile.input.at(t) * broadcast(B[t * S]));
  }
  auto next = load_array<kCount, Vec>(carry, Vec::kLanes), sum = map<kCount>([](int) { return broadcast(0.0f); });
  for (std::int64_t t = steps - 1; t >= 0; --t) {
    const auto input = tile.input.at(t), dy = tile.dy.at(t);
    const auto dh = fma(dy, broadcast(C[t * S]), next);
    float *to_dB = dB + t * S * Vec::kLanes, *to_dC = dC + t * S * Vec::kLanes;
    Vec of_B = load(to_dB), of_C = load(to_dC);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      of_B = fma(dh.vec[i], input.vec[i], of_B);
      of_C = fma(dy.vec[i], state.vec[i], of_C);
    }
    store(to_dB, of_B);
    store(to_dC, of_C);
    tile.dinput.set(t, fma(dh, broadcast(B[t * S]), tile.dinput.at(t)));
    next = dh * decay.at(t);
    state = before.at(t);
    const auto dexponent = next * state;
    sum = fma(dexponent, tile.step.at(t), sum);
    tile.drate.set(t, fma(dexponent, rate, tile.drate.at(t)));
  }
  store_array(carry, next, Vec::kLanes);
  add_to(dA, sum);
}

// The slope of softplus, 1 above 20.
template <typename X>
[[gnu::always_inline]] inline X softplus_slope(const X& x) {
  return select_less(broadcast(20.0f), x, broadcast(1.0f), sigmoid(x));
}

template <typename Element>
void scan_backward(const ScanBackwardCall& call, const ScanTask& task) {
  constexpr int kLanes = Vec::kLanes;
  const std::int64_t S = call.S, L = call.L, channels = task.end - task.begin;
  const std::int64_t of_states = S * task.pitch, tiles = (L + kScanSteps - 1) / kScanSteps;
  float *B = task.B_C, *C = task.B_C + kScanSteps * S;
  float *dB = task.dB_dC, *dC = task.dB_dC + kScanSteps * S * kLanes;
  for (std::int64_t g = 0; g < call.G; ++g) {
    const ScanPlace<Element> at(call, task, g);
    const Element* dy_rows = scan_rows<Element>(call.dy, task.n, call.shared ? 0 : g) + task.begin;
    Element* ddelta = static_cast<Element*>(call.ddelta) + (task.n * call.G + g) * L * call.D + task.begin;
    const SumRows dx = sum_rows<Element>(call, task, g, call.dx);
    const bool add = call.shared && g > 0;

    const auto load_step = [&](std::int32_t token, std::int64_t c, auto count, int lanes) {
      constexpr int kCount = decltype(count)::value;
      return load_array<kCount, Vec>(at.delta + token * call.delta.stride_l + c, lanes) +
             load_array<kCount, Vec>(at.bias + c, lanes);
    };
    for (std::int64_t i = 0; i < of_states; ++i) task.starts[i] = 0.0f;
    for (std::int64_t tile = 0; tile + 1 < tiles; ++tile) {
      float* states = task.starts + (tile + 1) * of_states;
      for (std::int64_t i = 0; i < of_states; ++i) states[i] = states[i - of_states];
      const std::int32_t* tokens = at.order + tile * kScanSteps;
      gather_rows(at.B, call.B.stride_l, tokens, kScanSteps, S, B);
      for_each_vectors<Vec, kScanVectors>(channels, [&](std::int64_t c, auto count, int lanes) {
        constexpr int kCount = decltype(count)::value;
        TileValues<kCount> step, input;
        for (std::int64_t t = 0; t < kScanSteps; ++t) {
          const auto dt = softplus(load_step(tokens[t], c, count, lanes));
          step.set(t, dt);
          input.set(t, dt * load_array<kCount, Vec>(at.x + tokens[t] * call.x.stride_l + c, lanes));
        }
        advance<false>(kScanSteps, step, input, at.A + c, task.A_pitch, B, B, S, states + c, task.pitch, input);
      });
    }

    float* dA = task.parameters + g * (S + 2) * task.A_pitch + task.begin;
    float *dskip = dA + S * task.A_pitch, *dbias = dskip + task.A_pitch;
    for (std::int64_t s = 0; s < S + 2; ++s) {
      for (std::int64_t c = 0; c < task.pitch; ++c) dA[s * task.A_pitch + c] = 0.0f;
    }
    float* carry = task.states;
    for (std::int64_t i = 0; i < of_states; ++i) carry[i] = 0.0f;
    for (std::int64_t tile_index = tiles - 1; tile_index >= 0; --tile_index) {
      const std::int64_t first = tile_index * kScanSteps, steps = min(kScanSteps, L - first);
      const std::int32_t* tokens = at.order + first;
      const float* starts = task.starts + tile_index * of_states;
      gather_rows(at.B, call.B.stride_l, tokens, steps, S, B);
      gather_rows(at.C, call.C.stride_l, tokens, steps, S, C);
      for (std::int64_t i = 0; i < 2 * kScanSteps * S * kLanes; ++i) task.dB_dC[i] = 0.0f;
      for_each_vectors<Vec, kScanVectors>(channels, [&](std::int64_t c, auto count, int lanes) {
        constexpr int kCount = decltype(count)::value;
        BackwardTile<kCount> tile;
        const auto zero = map<kCount>([](int) { return broadcast(0.0f); });
        for (std::int64_t t = 0; t < steps; ++t) {
          const auto x = load_array<kCount, Vec>(at.x + tokens[t] * call.x.stride_l + c, lanes);
          const auto dt = softplus(load_step(tokens[t], c, count, lanes));
          tile.x.set(t, x);
          tile.step.set(t, dt);
          tile.input.set(t, dt * x);
          tile.dy.set(t, load_array<kCount, Vec>(dy_rows + tokens[t] * call.dy.stride_l + c, lanes));
          tile.drate.set(t, zero);
          tile.dinput.set(t, zero);
        }
        for (std::int64_t s = 0; s < S; ++s) {
          state_backward(steps, tile, at.A + s * task.A_pitch + c, B + s, C + s, S, starts + s * task.pitch + c,
                         carry + s * task.pitch + c, dA + s * task.A_pitch + c, dB + s * kLanes, dC + s * kLanes);
        }

        const auto skip = load_array<kCount, Vec>(at.skip + c, lanes);
        auto of_skip = zero, of_bias = zero;
        for (std::int64_t t = 0; t < steps; ++t) {
          const auto dinput = tile.dinput.at(t), dy = tile.dy.at(t), x = tile.x.at(t);
          put(dx, add, tokens[t], c, lanes, fma(tile.step.at(t), dinput, skip * dy));
          const auto dstep = fma(x, dinput, tile.drate.at(t));
          const auto of_delta = dstep * softplus_slope(load_step(tokens[t], c, count, lanes));
          store_array(ddelta + tokens[t] * call.D + c, of_delta, lanes);
          of_skip = fma(dy, x, of_skip);
          of_bias = of_bias + of_delta;
        }
        add_to(dskip + c, of_skip);
        add_to(dbias + c, of_bias);
      });
      for (std::int64_t t = 0; t < steps; ++t) {
        const std::int64_t row = (g * L + tokens[t]) * S;
        for (std::int64_t s = 0; s < S; ++s) {
          task.dB_part[row + s] = sum_of_lanes(load(dB + (t * S + s) * kLanes));
          task.dC_part[row + s] = sum_of_lanes(load(dC + (t * S + s) * kLanes));
        }
      }
    }
    finish_sums<Element>(call, task, g, call.dx);
  }
}

template <typename Element>
constexpr ScanKernels kScanKernels{Vec::kLanes, scan_forward<Element>, scan_backward<Element>};

inline const ScanKernels* scan_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kScanKernels<float>;
    case DType::kBFloat16: return &kScanKernels<BFloat16>;
    case DType::kFloat16: return &kScanKernels<Float16>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace mambaout_kernels::cpu
