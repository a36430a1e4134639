#include "quantized_linear.h"

#include "quantized_gemm.h"
#include "row_blocks.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Offsets in scratch memory, in floats: quantized rows, then what LayerNorm needs, then a strip for a last panel.
struct Layout {
  Layout(int64_t rows, int64_t in, bool normalizes)
      : normalized(QuantizedRowsFloats(rows, in)),
        strip(normalized + (normalizes ? NormalizeScratch(in) : 0)),
        end(strip + rows * kPanelColumns) {}

  int64_t normalized;
  int64_t strip;
  int64_t end;
};

}  // namespace

void PlanQuantizedLinear(QuantizedLinearPlan* plan) {
  const int64_t panels = PanelCount(plan->out);
  plan->row_blocks = RowBlocks(plan->rows);
  plan->column_blocks = 1;
  // Few rows: columns are split too, as far as a block is still worth the claiming.
  constexpr int64_t kBlocks = 8;
  constexpr int64_t kProductsPerBlock = 1 << 21;
  const int64_t products = plan->rows * plan->in * plan->out;
  const int64_t blocks = Minimum(kBlocks, (products + kProductsPerBlock - 1) / kProductsPerBlock);
  const int64_t column_blocks = (blocks + plan->row_blocks - 1) / plan->row_blocks;
  if (plan->row_blocks < blocks) plan->column_blocks = Minimum(panels, column_blocks);
  const int64_t rows = (plan->rows + plan->row_blocks - 1) / plan->row_blocks;
  plan->scratch = Layout(rows, plan->in, plan->normalizes).end;
}

void RunQuantizedLinear(const QuantizedLinearPlan& plan, const QuantizedLinearArrays& arrays, int64_t block,
                        float* scratch) {
  const int64_t row_block = block / plan.column_blocks;
  const int64_t column_block = block % plan.column_blocks;
  const int64_t row = plan.rows * row_block / plan.row_blocks;
  const int64_t rows = plan.rows * (row_block + 1) / plan.row_blocks - row;
  const int64_t panels = PanelCount(plan.out);
  const Layout at(rows, plan.in, plan.normalizes);

  const Rows x = {arrays.x + row * arrays.x_stride, arrays.x_stride, nullptr};
  const QuantizedRows quantized = QuantizedRowsAt(scratch, rows, plan.in);
  if (plan.normalizes) {
    NormalizeAndQuantizeRows(x, rows, plan.in, plan.epsilon, arrays.norm_scale, arrays.norm_bias,
                             scratch + at.normalized, quantized);
  } else {
    QuantizeRows(x, rows, plan.in, quantized);
  }

  QuantizedProduct product = WholeQuantizedProduct(quantized, rows, arrays.weights);
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
  to.strip = scratch + at.strip;
  MultiplyQuantizedPanels(product, to);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
