// Products of a block of rows with packed weights. Included only by sources in kernels/.
//
// MultiplyTile keeps a tile of up to kTileRows rows x kPanelColumns columns in registers, reads the weights' panel as
// vectors and the rows' numbers as broadcasts. MultiplyPanels runs it over all tiles of a block of rows, panel by
// panel, so that a panel comes from the L3 cache or memory once and then from L1 or L2. Deep products are done in
// slices, the sums standing in the destination in between. The order in which products are added depends on the depth
// and its slices only: a row's results are the same bits whatever block it is in.
#pragma once

#include "../activation.h"
#include "packed_weights.h"
#include "simd.h"
#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

constexpr int64_t kPanelColumns = 2 * kLanes;

// Accumulators are 2 registers a row; 2 more hold the panel's vectors, 1 the broadcast, and the rest is room for the
// compiler. 14 x 32 on AVX-512: 28 FMAs for 16 loads, so that one load a cycle is enough even at two FMAs a cycle.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 12;
#endif

ATTN_DEPLOY_INLINE int64_t PanelCount(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

// Floats from one panel to the next.
ATTN_DEPLOY_INLINE int64_t PanelStride(int64_t in) { return (in + 1) * kPanelColumns; }

// One tile: c = (bias or c) + a @ b (+ residual), all columns of the panel. Strides are in floats, from row to row.
struct Tile {
  const float* a;
  int64_t a_stride;
  const float* b;  // [depth, kPanelColumns]
  int64_t depth;
  const float* bias;  // [kPanelColumns], or null: adds to what stands in c
  const float* residual;  // or null
  int64_t residual_stride;
  float* c;
  int64_t c_stride;
};

// The tile's rows are addressed from a pointer for every three of them, at 0, 1 and 2 strides, which x86 and ARM
// address without arithmetic; a pointer for each would not fit into the 16 registers of x86.
template <int kRows>
void MultiplyTile(const Tile& tile) {
  constexpr int kPointers = (kRows + 2) / 3;
  Vec sum[kRows][2];
  if (tile.bias != nullptr) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = Load(tile.bias);
      sum[r][1] = Load(tile.bias + kLanes);
      // Fetched while the sums are made: a row's stores would wait for memory one after another.
      __builtin_prefetch(tile.c + r * tile.c_stride, 1);
      if (kLanes == 16) __builtin_prefetch(tile.c + r * tile.c_stride + kLanes, 1);
    }
  } else {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = Load(tile.c + r * tile.c_stride);
      sum[r][1] = Load(tile.c + r * tile.c_stride + kLanes);
    }
  }
  const int64_t stride = tile.a_stride;
  const float* a[kPointers];
  ATTN_DEPLOY_UNROLL
  for (int p = 0; p < kPointers; ++p) a[p] = tile.a + 3 * p * stride;
  const float* b = tile.b;
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    const Vec b0 = Load(b + i * kPanelColumns);
    const Vec b1 = Load(b + i * kPanelColumns + kLanes);
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec value = Broadcast(a[r / 3][(r % 3) * stride + i]);
      sum[r][0] = Fma(value, b0, sum[r][0]);
      sum[r][1] = Fma(value, b1, sum[r][1]);
    }
  };
  // What is read 4 KB later, which the hardware does not fetch across pages: 2 to 4 % where weights come from L3, on
  // Zen 4. A few rows are done before it would come.
  constexpr int64_t kAhead = 4096 / sizeof(float);
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t pairs = tile.depth / 2; pairs > 0; --pairs) {
    if (kRows > 4) {
      ATTN_DEPLOY_UNROLL
      for (int64_t at = 0; at < 2 * kPanelColumns; at += kLine) __builtin_prefetch(b + kAhead + at);
    }
    step(0);
    step(1);
    b += 2 * kPanelColumns;
    ATTN_DEPLOY_UNROLL
    for (int p = 0; p < kPointers; ++p) {
      a[p] += 2;
      __asm__("" : "+r"(a[p]));  // or GCC finds that these move together, and keeps one address per row in memory
    }
  }
  if (tile.depth % 2 != 0) step(0);
  if (tile.residual != nullptr) {
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float* residual = tile.residual + r * tile.residual_stride;
      Store(tile.c + r * tile.c_stride, sum[r][0] + Load(residual));
      Store(tile.c + r * tile.c_stride + kLanes, sum[r][1] + Load(residual + kLanes));
    }
    return;
  }
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    Store(tile.c + r * tile.c_stride, sum[r][0]);
    Store(tile.c + r * tile.c_stride + kLanes, sum[r][1]);
  }
}

using TileFunction = void (*)(const Tile& tile);

// MultiplyTile for 1 to kTileRows rows.
ATTN_DEPLOY_INLINE TileFunction TileOfRows(int64_t rows) {
  static constexpr TileFunction kFunctions[] = {
      MultiplyTile<1>,  MultiplyTile<2>,  MultiplyTile<3>, MultiplyTile<4>, MultiplyTile<5>, MultiplyTile<6>,
#if !defined(__AVX2__) || defined(__AVX512F__)
      MultiplyTile<7>,  MultiplyTile<8>,  MultiplyTile<9>, MultiplyTile<10>, MultiplyTile<11>, MultiplyTile<12>,
#endif
#if defined(__AVX512F__)
      MultiplyTile<13>, MultiplyTile<14>,
#endif
  };
  static_assert(sizeof(kFunctions) / sizeof(kFunctions[0]) == kTileRows, "a function for each number of rows");
  return kFunctions[rows - 1];
}

// Rows in memory: row r stands at data + (map == null ? r : map[r]) * stride.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0;
  const int64_t* map = nullptr;
};

ATTN_DEPLOY_INLINE const float* RowAt(const Rows& rows, int64_t r) {
  return rows.data + (rows.map == nullptr ? r : rows.map[r]) * rows.stride;
}

// Where a product goes: y[r, c] = residual[r, c] + activation(sum[r, c]) for c in [0, columns). With `map`, row r is
// row map[r] of y. y overlaps neither what is multiplied nor the residual.
struct Destination {
  float* y = nullptr;
  int64_t stride = 0;
  int64_t columns = 0;
  const int64_t* map = nullptr;
  Rows residual = {};  // data may be null: no residual
  // Whether every row of y has room for all columns of the last panel: what is beyond `columns` is activation(0) then.
  // Not with a residual.
  bool has_room = false;
  Activation activation = Activation::kNone;
  // [rows, kPanelColumns], needed where y has a map or a last panel without room.
  float* strip = nullptr;
};

struct FinishedTile {
  const float* sum;  // may be y itself
  int64_t sum_stride;
  const Destination* to;
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
};

// Activation and residual on a tile of sums.
template <Activation kActivation>
void FinishTile(const FinishedTile& tile) {
  const Destination& to = *tile.to;
  const auto load = [](const float* from, int64_t count) {
    return count >= kLanes ? Load(from) : LoadPartial(from, Maximum(count, 0));
  };
  const auto store = [](float* y, Vec v, int64_t count) {
    if (count >= kLanes) return Store(y, v);
    if (count > 0) StorePartial(y, v, count);
  };
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* sum = tile.sum + r * tile.sum_stride;
    Vec v0 = Activated<kActivation>(Load(sum));
    Vec v1 = Activated<kActivation>(Load(sum + kLanes));
    const int64_t row = tile.row + r;
    if (to.residual.data != nullptr) {
      const float* residual = RowAt(to.residual, row) + tile.column;
      v0 = v0 + load(residual, tile.columns);
      v1 = v1 + load(residual + kLanes, tile.columns - kLanes);
    }
    float* y = to.y + (to.map == nullptr ? row : to.map[row]) * to.stride + tile.column;
    store(y, v0, tile.columns);
    store(y + kLanes, v1, tile.columns - kLanes);
  }
}

using FinishFunction = void (*)(const FinishedTile& tile);

ATTN_DEPLOY_INLINE FinishFunction FinishOf(Activation activation) {
  FinishFunction function = nullptr;
  WithActivation(activation, [&](auto form) { function = FinishTile<form.value>; });
  return function;
}

// A block of rows times the panels [first_panel, last_panel) of packed weights, or a part of that product: of the
// weights of inputs [first_input, last_input) only. The part with the first input starts from the bias, others from
// what stands in y; the part with the last one ends with activation and residual.
struct Product {
  const float* a = nullptr;  // [rows, last_input - first_input]: the part's own first column
  int64_t a_stride = 0;
  int64_t rows = 0;
  PackedWeights weights;
  int64_t first_panel = 0;
  int64_t last_panel = 0;
  int64_t first_input = 0;
  int64_t last_input = 0;
};

// All of it.
ATTN_DEPLOY_INLINE Product WholeProduct(const float* a, int64_t a_stride, int64_t rows, const PackedWeights& weights) {
  return {a, a_stride, rows, weights, 0, PanelCount(weights.out), 0, weights.in};
}

// Inputs multiplied at a time: 128 KB of a panel on AVX-512, and 14 rows of 4 KB, stay in L2 beside a block of rows.
constexpr int64_t kSliceInputs = 1024;

// All row groups of one panel, for the inputs [begin, end) of the product's part.
ATTN_DEPLOY_INLINE void MultiplyPanel(const Product& product, const Destination& to, FinishFunction finish,
                                      int64_t panel, int64_t begin, int64_t end) {
  const bool first = begin == 0;
  const bool last = end == product.weights.in;
  const float* data = product.weights.data + panel * PanelStride(product.weights.in);
  const float* a = product.a + (begin - product.first_input);
  const int64_t column = (panel - product.first_panel) * kPanelColumns;
  const int64_t columns = to.has_room ? kPanelColumns : Minimum(kPanelColumns, to.columns - column);
  const bool direct = columns == kPanelColumns && to.map == nullptr;
  const bool ends_in_tile = direct && to.activation == Activation::kNone && to.residual.map == nullptr;
  const bool adds = last && ends_in_tile && to.residual.data != nullptr;
  const int64_t groups = (product.rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0; group < groups; ++group) {
    // Groups of equal size, and not a last one of a row or two, which would be slow.
    const int64_t row = product.rows * group / groups;
    const int64_t rows = product.rows * (group + 1) / groups - row;
    float* const c = direct ? to.y + row * to.stride + column : to.strip + row * kPanelColumns;
    const int64_t c_stride = direct ? to.stride : kPanelColumns;
    const float* residual = adds ? to.residual.data + row * to.residual.stride + column : nullptr;
    TileOfRows(rows)({a + row * product.a_stride, product.a_stride, data + (1 + begin) * kPanelColumns, end - begin,
                      first ? data : nullptr, residual, to.residual.stride, c, c_stride});
    if (last && !ends_in_tile) finish({c, c_stride, &to, row, rows, column, columns});
  }
}

// Column c of the destination is column c of the product's first panel. A destination with a map takes products of all
// inputs only.
ATTN_DEPLOY_INLINE void MultiplyPanels(const Product& product, const Destination& to) {
  const FinishFunction finish = FinishOf(to.activation);
  const int64_t inputs = product.last_input - product.first_input;
  const int64_t slices = Maximum(1, (inputs + kSliceInputs - 1) / kSliceInputs);
  for (int64_t panel = product.first_panel; panel < product.last_panel; ++panel) {
    for (int64_t slice = 0; slice < slices; ++slice) {
      MultiplyPanel(product, to, finish, panel, product.first_input + inputs * slice / slices,
                    product.first_input + inputs * (slice + 1) / slices);
    }
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
