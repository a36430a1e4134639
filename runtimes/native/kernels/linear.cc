#include "linear.h"

#include "gemm.h"
#include "layer_norm.h"
#include "row_blocks.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Whether the rows of x are copied before they are multiplied: those of a tile would all lie in one set of L1.
bool Copies(const LinearPlan& plan, int64_t x_stride) { return !plan.normalizes && x_stride % 1024 == 0; }

}  // namespace

void PlanLinear(LinearPlan* plan) {
  const int64_t panels = PanelCount(plan->out);
  plan->row_blocks = RowBlocks(plan->rows);
  plan->column_blocks = 1;
  // Few rows: columns are split too, as far as a block is still worth the claiming (17 us on one Zen 4 core).
  constexpr int64_t kBlocks = 8;
  constexpr int64_t kProductsPerBlock = 1 << 20;
  const int64_t products = plan->rows * plan->in * plan->out;
  const int64_t blocks = Minimum(kBlocks, (products + kProductsPerBlock - 1) / kProductsPerBlock);
  const int64_t column_blocks = (blocks + plan->row_blocks - 1) / plan->row_blocks;
  if (plan->row_blocks < blocks) plan->column_blocks = Minimum(panels, column_blocks);
  const int64_t rows = (plan->rows + plan->row_blocks - 1) / plan->row_blocks;
  plan->scratch = rows * (ScratchStride(plan->in) + kPanelColumns);
}

void RunLinear(const LinearPlan& plan, const LinearArrays& arrays, int64_t block, float* scratch) {
  const int64_t row_block = block / plan.column_blocks;
  const int64_t column_block = block % plan.column_blocks;
  const int64_t row = plan.rows * row_block / plan.row_blocks;
  const int64_t rows = plan.rows * (row_block + 1) / plan.row_blocks - row;
  const int64_t panels = PanelCount(plan.out);

  Rows x = {arrays.x + row * arrays.x_stride, arrays.x_stride, nullptr};
  float* strip = scratch;
  float* const copy = scratch + rows * kPanelColumns;
  const int64_t copy_stride = ScratchStride(plan.in);
  if (plan.normalizes) {
    NormalizeRows(x, rows, plan.in, plan.epsilon, copy, copy_stride);
    x = {copy, copy_stride, nullptr};
  } else if (Copies(plan, arrays.x_stride)) {
    CopyRows(x, rows, plan.in, copy, copy_stride);
    x = {copy, copy_stride, nullptr};
  }

  Product product = WholeProduct(x.data, x.stride, rows, arrays.weights);
  product.first_panel = panels * column_block / plan.column_blocks;
  product.last_panel = panels * (column_block + 1) / plan.column_blocks;
  const int64_t column = product.first_panel * kPanelColumns;
  Destination to;
  to.y = arrays.y + row * arrays.y_stride + column;
  to.stride = arrays.y_stride;
  to.columns = Minimum(plan.out, product.last_panel * kPanelColumns) - column;
  if (arrays.residual != nullptr) {
    to.residual = {arrays.residual + row * arrays.residual_stride + column, arrays.residual_stride, nullptr};
  }
  to.activation = plan.activation;
  to.strip = strip;
  MultiplyPanels(product, to);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
