#include "feed_forward.h"

#include "gemm.h"
#include "layer_norm.h"
#include "row_blocks.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Hidden columns at a time: with 56 rows of 384 channels, rows, hidden columns and results are 260 KB, which leaves L2
// room for the weights that stream through it.
constexpr int64_t kHiddenColumns = 384;
static_assert(kHiddenColumns % kPanelColumns == 0, "whole panels");

// The normalized rows, a strip for a last panel, and the hidden columns of a block.
struct Scratch {
  int64_t normalized_stride;
  int64_t hidden_stride;

  explicit Scratch(const FeedForwardPlan& plan)
      : normalized_stride(ScratchStride(plan.channels)),
        hidden_stride(ScratchStride(Minimum(kHiddenColumns, PanelCount(plan.hidden) * kPanelColumns))) {}
  int64_t FloatsPerRow() const { return normalized_stride + hidden_stride + kPanelColumns; }
};

}  // namespace

void PlanFeedForward(FeedForwardPlan* plan) {
  plan->blocks = RowBlocks(plan->rows);
  // Few rows, much work: a tile a block.
  constexpr int64_t kProductsPerBlock = 1 << 20;
  if (plan->blocks == 1 && plan->rows > 1 && plan->rows * plan->channels * plan->hidden > kProductsPerBlock) {
    plan->blocks = 2;
  }
  const int64_t rows = (plan->rows + plan->blocks - 1) / plan->blocks;
  plan->scratch = rows * Scratch(*plan).FloatsPerRow();
}

void RunFeedForward(const FeedForwardPlan& plan, const FeedForwardArrays& arrays, int64_t block, float* scratch) {
  const Scratch sizes(plan);
  const int64_t row = plan.rows * block / plan.blocks;
  const int64_t rows = plan.rows * (block + 1) / plan.blocks - row;
  float* const strip = scratch;
  float* const normalized = strip + rows * kPanelColumns;
  float* const hidden = normalized + rows * sizes.normalized_stride;

  const Rows x = {arrays.x + row * arrays.x_stride, arrays.x_stride, nullptr};
  NormalizeRows(x, rows, plan.channels, plan.epsilon, normalized, sizes.normalized_stride);

  Product first = WholeProduct(normalized, sizes.normalized_stride, rows, arrays.weights1);
  Product second = WholeProduct(hidden, sizes.hidden_stride, rows, arrays.weights2);
  Destination to_hidden;
  to_hidden.y = hidden;
  to_hidden.stride = sizes.hidden_stride;
  to_hidden.has_room = true;
  to_hidden.activation = plan.activation;
  Destination to_y;
  to_y.y = arrays.y + row * arrays.y_stride;
  to_y.stride = arrays.y_stride;
  to_y.columns = plan.channels;
  to_y.residual = x;
  to_y.strip = strip;
  for (int64_t column = 0; column < plan.hidden; column += kHiddenColumns) {
    const int64_t end = Minimum(plan.hidden, column + kHiddenColumns);
    first.first_panel = column / kPanelColumns;
    first.last_panel = PanelCount(end);
    MultiplyPanels(first, to_hidden);
    second.first_input = column;
    second.last_input = end;
    MultiplyPanels(second, to_y);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
