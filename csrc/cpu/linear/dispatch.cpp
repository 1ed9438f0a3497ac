// The matrix products of training: the cut of a call into tasks, and which instruction set runs them.
#include <algorithm>

#include "../select_kernels.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Rows of a task, at most: 360 KiB of a, which stay in L2.
constexpr std::int64_t kTaskRows = 336;
// Tasks for each thread, so that one which has the processor to itself less takes fewer.
constexpr std::int64_t kTasksPerThread = 4;
// Columns of a task, at least: for fewer, a is read too often.
constexpr std::int64_t kTaskColumns = 64;

const MatmulKernels& kernels() { return *select_kernels<MatmulKernels>(); }

struct Plan {
  std::int64_t tiles, panels;            // of the output: rows and columns that are worked off at a time
  std::int64_t row_parts, column_parts;  // whole tiles and panels each
  std::int64_t rows;                     // of a part, at most
};

Plan plan_of(const MatmulCall& call, const MatmulKernels& kernels, int num_threads) {
  Plan plan;
  const std::int64_t columns = 2 * kernels.lanes, wanted = num_threads == 1 ? 1 : num_threads * kTasksPerThread;
  plan.tiles = ceil_div(call.M, kernels.tile_rows);
  plan.panels = std::max<std::int64_t>(1, ceil_div(call.N, columns));  // the row sums need one
  plan.row_parts = ceil_div(plan.tiles, kTaskRows / kernels.tile_rows);
  plan.column_parts = std::clamp<std::int64_t>(ceil_div(wanted, plan.row_parts), 1,
                                               ceil_div(plan.panels * columns, std::max(columns, kTaskColumns)));
  if (plan.row_parts * plan.column_parts < wanted) {
    plan.row_parts = std::min(plan.tiles, ceil_div(wanted, plan.column_parts));
  }
  plan.rows = ceil_div(plan.tiles, plan.row_parts) * kernels.tile_rows;
  return plan;
}

}  // namespace

MatmulWindow matmul_window(std::int64_t rows, int lanes) {
  MatmulWindow w;
  w.rows = 0;
  w.panel = w.rows + align_up(rows * kMatmulStep * 4);
  w.tile = w.panel + align_up(kMatmulDepth * 2 * lanes * 4);
  w.row_sums = w.tile + align_up(16 * 2 * lanes * 4);
  w.total = w.row_sums + align_up(rows * 8);
  return w;
}

std::int64_t matmul_workspace_bytes(const MatmulCall& call, int num_threads) {
  if (call.M == 0) return kLine;
  const MatmulKernels& k = kernels();
  return num_threads * matmul_window(plan_of(call, k, num_threads).rows, k.lanes).total + kLine;
}

void matmul(const MatmulCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  if (call.M == 0) return;
  const MatmulKernels& k = kernels();
  const Plan plan = plan_of(call, k, num_threads);
  const std::int64_t bytes = matmul_window(plan.rows, k.lanes).total, columns = 2 * k.lanes;
  char* base = align_up(workspace);
  run_tasks(plan.row_parts * plan.column_parts, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
    const std::int64_t row = task / plan.column_parts, column = task % plan.column_parts;
    const auto bound = [](std::int64_t count, std::int64_t parts, std::int64_t i, std::int64_t size, std::int64_t end) {
      return std::min(part_begin(count, parts, i) * size, end);
    };
    k.run({&call, bound(plan.tiles, plan.row_parts, row, k.tile_rows, call.M),
           bound(plan.tiles, plan.row_parts, row + 1, k.tile_rows, call.M),
           bound(plan.panels, plan.column_parts, column, columns, call.N),
           bound(plan.panels, plan.column_parts, column + 1, columns, call.N), base + slot * bytes});
  });
}

void dots(const DotsCall& call, int num_threads, ParallelFor parallel_for) {
  if (call.M == 0 || call.N == 0) return;
  const MatmulKernels& k = kernels();
  const std::int64_t parts = std::min(call.N, num_threads == 1 ? 1 : num_threads * kTasksPerThread);
  run_tasks(parts, num_threads, parallel_for, [&](std::int64_t, std::int64_t task) {
    k.run_dots({&call, part_begin(call.N, parts, task), part_begin(call.N, parts, task + 1)});
  });
}

}  // namespace mambaout_kernels::cpu
