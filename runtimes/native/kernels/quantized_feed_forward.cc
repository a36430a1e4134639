#include "quantized_feed_forward.h"

#include "quantized_gemm.h"
#include "row_blocks.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Panels of the first product that hold a group of hidden columns. A panel at the border of two groups is made for both.
struct GroupPanels {
  GroupPanels(int64_t columns, int64_t group)
      : first(group * columns / kPanelColumns),
        last(PanelCount((group + 1) * columns)),
        column(group * columns - first * kPanelColumns) {}

  int64_t first;
  int64_t last;
  int64_t column;  // the group's first, counted from the first panel's
};

// Where things stand in scratch memory, for a block of as many rows. Offsets in floats; the strip comes first.
struct Layout {
  Layout(const QuantizedFeedForwardPlan& plan, int64_t rows)
      : group_columns(plan.hidden / plan.groups),
        hidden_stride(ScratchStride((PanelCount(group_columns) + 1) * kPanelColumns)),
        normalizing(WholeLines(rows * kPanelColumns)),
        levels(normalizing + WholeLines(NormalizeScratch(plan.channels))),
        hidden(levels + QuantizedRowsFloats(rows, plan.channels)),
        hidden_levels(hidden + Minimum(rows, kTileRows) * hidden_stride),
        end(hidden_levels + QuantizedRowsFloats(rows, group_columns)) {}

  int64_t group_columns;
  int64_t hidden_stride;
  int64_t normalizing;
  int64_t levels;
  int64_t hidden;
  int64_t hidden_levels;
  int64_t end;
};

QuantizedRows RowsFrom(const QuantizedRows& rows, int64_t first) {
  return {rows.levels + first * rows.stride, rows.stride, rows.scale + first, rows.zero + first};
}

// A group of hidden columns of all rows of a block, a tile of rows at a time: made, activated, quantized.
void MakeHidden(const QuantizedFeedForwardPlan& plan, const QuantizedFeedForwardArrays& arrays, const Layout& at,
                const QuantizedRows& x, int64_t rows, int64_t group, float* hidden, const QuantizedRows& hidden_levels) {
  const GroupPanels panels(at.group_columns, group);
  QuantizedProduct product;
  product.weights = arrays.weights1;
  product.first_panel = panels.first;
  product.last_panel = panels.last;
  Destination to;
  to.y = hidden;
  to.stride = at.hidden_stride;
  to.columns = (panels.last - panels.first) * kPanelColumns;
  to.has_room = true;
  to.activation = plan.activation;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = rows * tile / tiles;
    product.a = RowsFrom(x, row);
    product.rows = rows * (tile + 1) / tiles - row;
    MultiplyQuantizedPanels(product, to);
    QuantizeRows({hidden + panels.column, at.hidden_stride, nullptr}, product.rows, at.group_columns,
                 RowsFrom(hidden_levels, row));
  }
}

}  // namespace

void PlanQuantizedFeedForward(QuantizedFeedForwardPlan* plan) {
  plan->blocks = RowBlocks(plan->rows);
  // Few rows, much work: a tile a block.
  constexpr int64_t kProductsPerBlock = 1 << 22;
  if (plan->blocks == 1 && plan->rows > 1 && plan->rows * plan->channels * plan->hidden > kProductsPerBlock) {
    plan->blocks = 2;
  }
  plan->scratch = Layout(*plan, (plan->rows + plan->blocks - 1) / plan->blocks).end;
}

void RunQuantizedFeedForward(const QuantizedFeedForwardPlan& plan, const QuantizedFeedForwardArrays& arrays,
                             int64_t block, float* scratch) {
  const int64_t row = plan.rows * block / plan.blocks;
  const int64_t rows = plan.rows * (block + 1) / plan.blocks - row;
  const Layout at(plan, rows);
  const Rows x = {arrays.x + row * arrays.x_stride, arrays.x_stride, nullptr};
  const QuantizedRows levels = QuantizedRowsAt(scratch + at.levels, rows, plan.channels);
  NormalizeAndQuantizeRows(x, rows, plan.channels, plan.epsilon, arrays.norm_scale, arrays.norm_bias,
                           scratch + at.normalizing, levels);

  QuantizedProduct second;
  second.a = QuantizedRowsAt(scratch + at.hidden_levels, rows, at.group_columns);
  second.rows = rows;
  second.weights = arrays.weights2;
  second.last_panel = PanelCount(plan.channels);
  Destination to;
  to.y = arrays.y + row * arrays.y_stride;
  to.stride = arrays.y_stride;
  to.columns = plan.channels;
  to.residual = x;
  to.strip = scratch;
  for (; second.group < plan.groups; ++second.group) {
    MakeHidden(plan, arrays, at, levels, rows, second.group, scratch + at.hidden, second.a);
    MultiplyQuantizedPanels(second, to);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
