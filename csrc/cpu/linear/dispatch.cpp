// The matrix products of linear layers: the partition of a call into tasks.
#include <algorithm>

#include "../select_kernels.h"
#include "../tasks.h"
#include "arguments.h"
#include "kernels.h"

namespace mambaout_kernels::cpu {
namespace {

// Rows of a task, at most: their packed part of a, 360 KiB, stays in L2.
constexpr std::int64_t kMc = 336;
// Tasks for each thread: a thread that is interrupted takes fewer.
constexpr std::int64_t kTasksPerThread = 4;
// Columns of a task, at least: with fewer, a is read too often.
constexpr std::int64_t kTaskColumns = 64;

const MatmulKernels& kernels() { return *select_kernels<MatmulKernels>(); }

struct Plan {
  std::int64_t tiles, panels;            // of the output: in units of mr rows and of two vectors of columns
  std::int64_t row_parts, column_parts;  // whole tiles and panels each
  std::int64_t rows;                     // of a part, at most
};

Plan plan_of(const MatmulCall& call, const MatmulKernels& kernels, int num_threads) {
  Plan plan;
  const std::int64_t columns = 2 * kernels.format.lanes, wanted = num_threads == 1 ? 1 : num_threads * kTasksPerThread;
  plan.tiles = ceil_div(call.M, kernels.mr);
  plan.panels = std::max<std::int64_t>(1, ceil_div(call.N, columns));  // the row sums need one
  plan.row_parts = ceil_div(plan.tiles, kMc / kernels.mr);
  plan.column_parts = std::clamp<std::int64_t>(ceil_div(wanted, plan.row_parts), 1,
                                               ceil_div(plan.panels * columns, std::max(columns, kTaskColumns)));
  if (plan.row_parts * plan.column_parts < wanted) {
    plan.row_parts = std::min(plan.tiles, ceil_div(wanted, plan.column_parts));
  }
  plan.rows = ceil_div(plan.tiles, plan.row_parts) * kernels.mr;
  return plan;
}

}  // namespace

MatmulScratch matmul_scratch(std::int64_t rows, PackedFormat format) noexcept {
  MatmulScratch w;
  w.rows = 0;
  w.plane = (rows + rows_read_beyond(format)) * packed_lda(format);
  w.panel = w.rows + align_up(w.plane * format.element_bytes());
  w.tile = w.panel + align_up(kKc * 2 * format.lanes * format.element_bytes());
  w.row_sums = w.tile + align_up(kMaxMr * 2 * format.lanes * 4);
  w.total = w.row_sums + align_up(rows * 8);
  return w;
}

std::int64_t matmul_workspace_bytes(const MatmulCall& call, int num_threads) {
  if (call.M == 0) return kLine;
  const MatmulKernels& k = kernels();
  return num_threads * matmul_scratch(plan_of(call, k, num_threads).rows, k.format).total + kLine;
}

void matmul(const MatmulCall& call, int num_threads, void* workspace, ParallelFor parallel_for) {
  if (call.M == 0) return;
  const MatmulKernels& k = kernels();
  const Plan plan = plan_of(call, k, num_threads);
  const std::int64_t bytes = matmul_scratch(plan.rows, k.format).total, columns = 2 * k.format.lanes;
  char* base = align_up(workspace);
  run_tasks(plan.row_parts * plan.column_parts, num_threads, parallel_for, [&](std::int64_t slot, std::int64_t task) {
    const std::int64_t row = task / plan.column_parts, column = task % plan.column_parts;
    const auto bound = [](std::int64_t count, std::int64_t parts, std::int64_t i, std::int64_t size, std::int64_t end) {
      return std::min(part_begin(count, parts, i) * size, end);
    };
    k.run({&call, bound(plan.tiles, plan.row_parts, row, k.mr, call.M),
           bound(plan.tiles, plan.row_parts, row + 1, k.mr, call.M),
           bound(plan.panels, plan.column_parts, column, columns, call.N),
           bound(plan.panels, plan.column_parts, column + 1, columns, call.N), base + slot * bytes});
  });
}

void gemm_nt(const GemmNtCall& call, int num_threads, ParallelFor parallel_for) {
  if (call.M == 0 || call.N == 0) return;
  const MatmulKernels& k = kernels();
  const std::int64_t parts = std::min(call.N, num_threads == 1 ? 1 : num_threads * kTasksPerThread);
  run_tasks(parts, num_threads, parallel_for, [&](std::int64_t, std::int64_t task) {
    k.run_gemm_nt({&call, part_begin(call.N, parts, task), part_begin(call.N, parts, task + 1)});
  });
}

}  // namespace mambaout_kernels::cpu
