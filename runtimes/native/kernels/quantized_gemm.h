// Products of a block of quantized rows with packed 8-bit weights. Included only by sources in kernels/.
//
// As gemm.h, whose destinations it writes: a tile of up to kTileRows rows x kPanelColumns columns stays in registers,
// here as 32-bit sums of weight * (level - zero), which are exact. A tile ends as
// float(sum) * scale[row] * weight_scale[column] + bias, in float32, and gemm.h's activation and residual.
#pragma once

#include "gemm.h"
#include "quantize_rows.h"
#include "quantized_panel.h"
#include "quantized_weights.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// One tile: c = (start or c) + float(a @ b) * scales (+ residual), all columns of the panel.
struct QuantizedTile {
  const Level* a;
  int64_t a_stride;      // in levels
  const float* a_scale;  // [rows]
  const int32_t* a_zero;
  const PackedWeight* b;     // [steps, kPanelColumns, kGroup]
  int64_t steps;             // inputs / kGroup
  const int32_t* minus_sums;  // [kPanelColumns]
  const float* b_scale;
  // What the product is added to: the bias with a stride of 0, or c.
  const float* start;
  int64_t start_stride;
  const float* residual;  // or null
  int64_t residual_stride;
  float* c;
  int64_t c_stride;
};

// Rows are addressed as in gemm.h's MultiplyTile.
template <int kRows>
void MultiplyQuantizedTile(const QuantizedTile& tile) {
  constexpr int kPointers = (kRows + 2) / 3;
  constexpr int64_t kStep = QuantizedPanel::kStep;
  IntVec sum[kRows][2];
  {
    const IntVec minus_sums[] = {LoadInts(tile.minus_sums), LoadInts(tile.minus_sums + kLanes)};
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const IntVec zero = BroadcastInt(tile.a_zero[r]);
      sum[r][0] = Multiply(zero, minus_sums[0]);
      sum[r][1] = Multiply(zero, minus_sums[1]);
      __builtin_prefetch(tile.c + r * tile.c_stride, 1);
      if (kLanes == 16) __builtin_prefetch(tile.c + r * tile.c_stride + kLanes, 1);
    }
  }
  const int64_t stride = tile.a_stride;
  const Level* a[kPointers];
  ATTN_DEPLOY_UNROLL
  for (int p = 0; p < kPointers; ++p) a[p] = tile.a + 3 * p * stride;
  const PackedWeight* b = tile.b;
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    const WeightVec b0 = LoadWeights(b + i * kStep);
    const WeightVec b1 = LoadWeights(b + i * kStep + kLanes * kGroup);
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const LevelVec levels = BroadcastLevels(a[r / 3] + (r % 3) * stride + i * kGroup);
      sum[r][0] = Dot(sum[r][0], levels, b0);
      sum[r][1] = Dot(sum[r][1], levels, b1);
    }
  };
  for (int64_t pairs = tile.steps / 2; pairs > 0; --pairs) {
    step(0);
    step(1);
    b += 2 * kStep;
    ATTN_DEPLOY_UNROLL
    for (int p = 0; p < kPointers; ++p) {
      a[p] += 2 * kGroup;
      __asm__("" : "+r"(a[p]));  // or GCC finds that these move together, and keeps one address per row in memory
    }
  }
  if (tile.steps % 2 != 0) step(0);

  const Vec b_scale[] = {Load(tile.b_scale), Load(tile.b_scale + kLanes)};
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Vec a_scale = Broadcast(tile.a_scale[r]);
    const float* start = tile.start + r * tile.start_stride;
    float* c = tile.c + r * tile.c_stride;
    Vec v0 = Fma(ToFloat(sum[r][0]) * a_scale, b_scale[0], Load(start));
    Vec v1 = Fma(ToFloat(sum[r][1]) * a_scale, b_scale[1], Load(start + kLanes));
    if (tile.residual != nullptr) {
      v0 = v0 + Load(tile.residual + r * tile.residual_stride);
      v1 = v1 + Load(tile.residual + r * tile.residual_stride + kLanes);
    }
    Store(c, v0);
    Store(c + kLanes, v1);
  }
}

using QuantizedTileFunction = void (*)(const QuantizedTile& tile);

// MultiplyQuantizedTile for 1 to kTileRows rows.
ATTN_DEPLOY_INLINE QuantizedTileFunction QuantizedTileOfRows(int64_t rows) {
  static constexpr QuantizedTileFunction kFunctions[] = {
      MultiplyQuantizedTile<1>,  MultiplyQuantizedTile<2>,  MultiplyQuantizedTile<3>,
      MultiplyQuantizedTile<4>,  MultiplyQuantizedTile<5>,  MultiplyQuantizedTile<6>,
#if !defined(__AVX2__) || defined(__AVX512F__)
      MultiplyQuantizedTile<7>,  MultiplyQuantizedTile<8>,  MultiplyQuantizedTile<9>,
      MultiplyQuantizedTile<10>, MultiplyQuantizedTile<11>, MultiplyQuantizedTile<12>,
#endif
#if defined(__AVX512F__)
      MultiplyQuantizedTile<13>, MultiplyQuantizedTile<14>,
#endif
  };
  static_assert(sizeof(kFunctions) / sizeof(kFunctions[0]) == kTileRows, "a function for each number of rows");
  return kFunctions[rows - 1];
}

// A block of quantized rows times the panels [first_panel, last_panel) of packed weights, for the inputs of one group:
// all of them where there is one. The first group starts from the bias, others add to what stands in the destination;
// the last one ends with activation and residual. Groups in between have to be multiplied in turn.
struct QuantizedProduct {
  QuantizedRows a;  // [rows, in / groups]: the levels of the group's inputs, and their own scales and zeros
  int64_t rows = 0;
  QuantizedWeights weights;
  int64_t first_panel = 0;
  int64_t last_panel = 0;
  int64_t group = 0;
};

// All of it.
ATTN_DEPLOY_INLINE QuantizedProduct WholeQuantizedProduct(const QuantizedRows& a, int64_t rows,
                                                          const QuantizedWeights& weights) {
  return {a, rows, weights, 0, PanelCount(weights.out), 0};
}

// All row groups of one panel.
ATTN_DEPLOY_INLINE void MultiplyQuantizedPanel(const QuantizedProduct& product, const Destination& to,
                                               FinishFunction finish, int64_t panel) {
  const QuantizedPanel layout(product.weights);
  const char* data = static_cast<const char*>(product.weights.data) + panel * layout.stride;
  const bool first = product.group == 0;
  const bool last = product.group == product.weights.groups - 1;
  const int64_t column = (panel - product.first_panel) * kPanelColumns;
  const int64_t columns = to.has_room ? kPanelColumns : Minimum(kPanelColumns, to.columns - column);
  const bool direct = columns == kPanelColumns && to.map == nullptr;
  const bool ends_in_tile = direct && to.activation == Activation::kNone && to.residual.map == nullptr;
  const bool adds = last && ends_in_tile && to.residual.data != nullptr;
  QuantizedTile tile;
  tile.a_stride = product.a.stride;
  tile.b = layout.Weights(data, product.group);
  tile.steps = LevelGroups(product.weights.in / product.weights.groups);
  tile.minus_sums = layout.MinusSums(data, product.group);
  tile.b_scale = QuantizedPanel::Scale(data);
  tile.residual_stride = to.residual.stride;
  tile.c_stride = direct ? to.stride : kPanelColumns;
  tile.start_stride = first ? 0 : tile.c_stride;
  const int64_t groups = (product.rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0; group < groups; ++group) {
    // Groups of equal size, and not a last one of a row or two, which would be slow.
    const int64_t row = product.rows * group / groups;
    const int64_t rows = product.rows * (group + 1) / groups - row;
    tile.a = product.a.levels + row * product.a.stride;
    tile.a_scale = product.a.scale + row;
    tile.a_zero = product.a.zero + row;
    tile.c = direct ? to.y + row * to.stride + column : to.strip + row * kPanelColumns;
    tile.start = first ? QuantizedPanel::Bias(data) : tile.c;
    tile.residual = adds ? to.residual.data + row * to.residual.stride + column : nullptr;
    QuantizedTileOfRows(rows)(tile);
    if (last && !ends_in_tile) finish({tile.c, tile.c_stride, &to, row, rows, column, columns});
  }
}

// Column c of the destination is column c of the product's first panel. A destination with a map takes weights of one
// group only; with several groups, one strip stays between them.
ATTN_DEPLOY_INLINE void MultiplyQuantizedPanels(const QuantizedProduct& product, const Destination& to) {
  const FinishFunction finish = FinishOf(to.activation);
  for (int64_t panel = product.first_panel; panel < product.last_panel; ++panel) {
    MultiplyQuantizedPanel(product, to, finish, panel);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
