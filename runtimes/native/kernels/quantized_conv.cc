// Implicit matrix product: the inputs of a block of pixels are gathered row by row, or read where they stand, and
// multiplied with panels of packed weights, as quantized_gemm.h does. Gathering costs a few percent even where a map
// has 64 channels, since a kernel row is one contiguous run of bytes.
#include "quantized_conv.h"

#include "dot.h"
#include "gemm.h"
#include "quantize_rows.h"
#include "requantize.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// A panel: multipliers, biases, residual multipliers, inverses, starts of the sums, then the weights.
struct Panel {
  const float* multiplier;
  const float* bias;
  const float* residual_multiplier;
  const float* inverse;
  const int32_t* start;
  const PackedWeight* weights;
};

constexpr int64_t kConstants = 5;

int64_t PanelBytes(int64_t depth) {
  const auto weights = static_cast<int64_t>(LevelGroups(depth) * kGroup * kPanelColumns * sizeof(PackedWeight));
  return (kConstants * kPanelColumns * 4 + weights + 63) / 64 * 64;
}

ATTN_DEPLOY_INLINE Panel PanelAt(const void* packed, int64_t depth, int64_t panel) {
  const auto* const floats =
      reinterpret_cast<const float*>(static_cast<const char*>(packed) + panel * PanelBytes(depth));
  return {floats,
          floats + kPanelColumns,
          floats + 2 * kPanelColumns,
          floats + 3 * kPanelColumns,
          reinterpret_cast<const int32_t*>(floats + 4 * kPanelColumns),
          reinterpret_cast<const PackedWeight*>(floats + kConstants * kPanelColumns)};
}

ATTN_DEPLOY_INLINE void StoreInts(int32_t* p, IntVec v) { __builtin_memcpy(p, &v, sizeof v); }

struct SumTile {
  const Level* a;
  int64_t a_stride;
  int64_t groups;
  const PackedWeight* weights;
  const int32_t* start;
  int32_t* sums;  // [rows, kPanelColumns]
};

// As MultiplyTile in gemm.h, which says why rows have a pointer for every three of them.
template <int kRows>
void SumRows(const SumTile& tile) {
  constexpr int kPointers = (kRows + 2) / 3;
  constexpr int64_t kVector = kLanes * kGroup;
  IntVec sum[kRows][2];
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = LoadInts(tile.start);
    sum[r][1] = LoadInts(tile.start + kLanes);
  }
  const int64_t stride = tile.a_stride;
  const Level* a[kPointers];
  ATTN_DEPLOY_UNROLL
  for (int p = 0; p < kPointers; ++p) a[p] = tile.a + 3 * p * stride;
  const PackedWeight* b = tile.weights;
  for (int64_t group = 0; group < tile.groups; ++group) {
    const WeightVec b0 = LoadWeights(b);
    const WeightVec b1 = LoadWeights(b + kVector);
    ATTN_DEPLOY_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const LevelVec levels = BroadcastLevels(a[r / 3] + (r % 3) * stride);
      sum[r][0] = Dot(sum[r][0], levels, b0);
      sum[r][1] = Dot(sum[r][1], levels, b1);
    }
    b += 2 * kVector;
    ATTN_DEPLOY_UNROLL
    for (int p = 0; p < kPointers; ++p) {
      a[p] += kGroup;
      __asm__("" : "+r"(a[p]));  // as in gemm.h: or GCC keeps one address per row in memory
    }
  }
  ATTN_DEPLOY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    StoreInts(tile.sums + r * kPanelColumns, sum[r][0]);
    StoreInts(tile.sums + r * kPanelColumns + kLanes, sum[r][1]);
  }
}

using SumFunction = void (*)(const SumTile& tile);

ATTN_DEPLOY_INLINE SumFunction SumOfRows(int64_t rows) {
  static constexpr SumFunction kFunctions[] = {
      SumRows<1>,  SumRows<2>,  SumRows<3>, SumRows<4>, SumRows<5>, SumRows<6>,
#if !defined(__AVX2__) || defined(__AVX512F__)
      SumRows<7>,  SumRows<8>,  SumRows<9>, SumRows<10>, SumRows<11>, SumRows<12>,
#endif
#if defined(__AVX512F__)
      SumRows<13>, SumRows<14>,
#endif
  };
  static_assert(sizeof(kFunctions) / sizeof(kFunctions[0]) == kTileRows, "a function for each number of rows");
  return kFunctions[rows - 1];
}

struct LevelTile {
  const int32_t* sums;  // [rows, kPanelColumns]
  int64_t rows;
  int64_t columns;  // at most kPanelColumns
  const Panel* panel;
  const uint8_t* residual;  // or null
  uint8_t* y;
  int64_t stride;  // of residual and y, from row to row
  uint8_t zero;
};

// One vector of a row: kWhole where all its lanes are columns.
template <Activation kActivation, bool kResidual, bool kWhole>
ATTN_DEPLOY_INLINE void FinishVector(const LevelTile& tile, int64_t row, int64_t lane, float zero, float low) {
  const int64_t count = tile.columns - lane;
  const int64_t at = row * tile.stride + lane;
  Vec v = Fma(ToFloat(LoadInts(tile.sums + row * kPanelColumns + lane)), Load(tile.panel->multiplier + lane),
              Load(tile.panel->bias + lane));
  if constexpr (kResidual) {
    const Vec residual = kWhole ? LoadLevels(tile.residual + at) : LoadLevels(tile.residual + at, count);
    v = Fma(residual, Load(tile.panel->residual_multiplier + lane), v);
  }
  v = LevelOf<kActivation>(v, Load(tile.panel->inverse + lane), zero, low);
  if constexpr (kWhole) {
    StoreLevels(tile.y + at, v);
  } else {
    StoreLevels(tile.y + at, v, count);
  }
}

template <Activation kActivation, bool kResidual>
void FinishRows(const LevelTile& tile) {
  const auto zero = static_cast<float>(tile.zero);
  const float low = LeastLevel(kActivation, tile.zero);
  if (tile.columns == kPanelColumns) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      FinishVector<kActivation, kResidual, true>(tile, r, 0, zero, low);
      FinishVector<kActivation, kResidual, true>(tile, r, kLanes, zero, low);
    }
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    int64_t lane = 0;
    for (; lane + kLanes <= tile.columns; lane += kLanes) {
      FinishVector<kActivation, kResidual, true>(tile, r, lane, zero, low);
    }
    if (lane < tile.columns) FinishVector<kActivation, kResidual, false>(tile, r, lane, zero, low);
  }
}

using FinishLevels = void (*)(const LevelTile& tile);

ATTN_DEPLOY_INLINE FinishLevels FinishLevelsOf(Activation activation, bool residual) {
  FinishLevels function = nullptr;
  WithMapActivation(activation, [&](auto form) {
    function = residual ? FinishRows<form.value, true> : FinishRows<form.value, false>;
  });
  return function;
}

// -- gathering --------------------------------------------------------------------------------------------------------

ATTN_DEPLOY_INLINE void CopyLevels(const uint8_t* from, int64_t count, Level* to) {
  int64_t i = 0;
#if defined(__AVX512VNNI__)
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  const __mmask64 rest = (uint64_t{1} << (count - i)) - 1;
  _mm512_mask_storeu_epi8(to + i, rest, _mm512_maskz_loadu_epi8(rest, from + i));
#else
#if defined(__AVX2__) && !defined(__AVXVNNI__)
  for (; i + 16 <= count; i += 16) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), words);
  }
#elif defined(__AVXVNNI__)
  for (; i + 32 <= count; i += 32) __builtin_memcpy(to + i, from + i, 32);
#endif
  for (; i < count; ++i) to[i] = static_cast<Level>(from[i] - kLevelOffset);
#endif
}

ATTN_DEPLOY_INLINE void FillLevels(Level level, int64_t count, Level* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = level;
}

// The inputs of output pixel (row, column): kernel_height runs of kernel_width * in levels.
ATTN_DEPLOY_INLINE void GatherPixel(const QuantizedConvPlan& p, const uint8_t* x, int64_t row, int64_t column,
                                    Level* to) {
  const auto zero = static_cast<Level>(p.x_zero - kLevelOffset);
  const int64_t run = p.kernel_width * p.in;
  const int64_t left = column * p.stride - p.pad_left;
  const int64_t top = row * p.stride - p.pad_top;
  if (left >= 0 && top >= 0 && left + p.kernel_width <= p.width && top + p.kernel_height <= p.height) {
    const uint8_t* from = x + (top * p.width + left) * p.in;
    const int64_t stride = p.width * p.in;
    for (int64_t down = 0; down < p.kernel_height; ++down) CopyLevels(from + down * stride, run, to + down * run);
    return;
  }
  const int64_t before = Minimum(Maximum(-left, 0), p.kernel_width);
  const int64_t end = Maximum(Minimum(p.width - left, p.kernel_width), before);
  for (int64_t down = 0; down < p.kernel_height; ++down, to += run) {
    const int64_t y = top + down;
    if (y < 0 || y >= p.height) {
      FillLevels(zero, run, to);
      continue;
    }
    FillLevels(zero, before * p.in, to);
    if (end > before) CopyLevels(x + (y * p.width + left + before) * p.in, (end - before) * p.in, to + before * p.in);
    FillLevels(zero, (p.kernel_width - end) * p.in, to + end * p.in);
  }
}

ATTN_DEPLOY_INLINE int64_t Depth(const QuantizedConvPlan& p) { return p.kernel_height * p.kernel_width * p.in; }

// Whether rows of the product stand in x as they are needed.
ATTN_DEPLOY_INLINE bool ReadsInPlace(const QuantizedConvPlan& p) {
  return sizeof(Level) == 1 && kLevelOffset == 0 && p.kernel_height * p.kernel_width == 1 && p.stride == 1 &&
         p.pad_top == 0 && p.pad_left == 0 && p.out_height == p.height && p.out_width == p.width &&
         p.in % kGroup == 0;
}

// Multiply-adds of a block of work: about 5 us with VNNI. Layers of MobileNets have ten times that: with larger blocks
// one of two threads would wait for the other for a good part of the layer.
constexpr int64_t kMultiplyAddsPerBlock = 1024 * 1024;
constexpr int64_t kMostBlocks = 32;
constexpr int64_t kMostGathered = 384 * 1024;  // bytes: a third of an L2 cache

}  // namespace

int64_t QuantizedConvSize(int64_t depth, int64_t out) { return PanelCount(out) * PanelBytes(depth); }

void PackQuantizedConv(const uint8_t* weight, const Requantization& requantization, uint8_t x_zero, int64_t depth,
                       int64_t out, void* packed) {
  const int32_t zero = x_zero - kLevelOffset;
  for (int64_t panel = 0; panel < PanelCount(out); ++panel) {
    const Panel to = PanelAt(packed, depth, panel);
    auto* const weights = const_cast<PackedWeight*>(to.weights);
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      const int64_t column = panel * kPanelColumns + c;
      const bool there = column < out;
      const auto copy = [&](const float* from, const float* target) {
        const_cast<float*>(target)[c] = there && from != nullptr ? from[column] : 0.0f;
      };
      copy(requantization.multiplier, to.multiplier);
      copy(requantization.bias, to.bias);
      copy(requantization.residual_multiplier, to.residual_multiplier);
      copy(requantization.inverse, to.inverse);
      int32_t sum = 0;
      for (int64_t i = 0; i < LevelGroups(depth) * kGroup; ++i) {
        const int w = there && i < depth ? weight[column * depth + i] - 128 : 0;
        weights[(i / kGroup * kPanelColumns + c) * kGroup + i % kGroup] = static_cast<PackedWeight>(w);
        sum += w;
      }
      const_cast<int32_t*>(to.start)[c] = -zero * sum;
    }
  }
}

void PlanQuantizedConv(QuantizedConvPlan* plan) {
  QuantizedConvPlan& p = *plan;
  const int64_t pixels = p.out_height * p.out_width;
  const int64_t depth = Depth(p);
  const int64_t panels = PanelCount(p.out);
  const int64_t wanted = Minimum(Maximum(pixels * depth * p.out / kMultiplyAddsPerBlock, 1), kMostBlocks);
  // Rows first, as long as a block has a few tiles of them, since a block of columns gathers its pixels again.
  const int64_t most_rows = Maximum(pixels / (4 * kTileRows), 1);
  int64_t row_blocks = Minimum(wanted, most_rows);
  if (!ReadsInPlace(p)) {
    const int64_t row_bytes = static_cast<int64_t>(LevelStride(depth) * sizeof(Level));
    const int64_t rows = Maximum(kMostGathered / row_bytes, kTileRows);
    row_blocks = Maximum(row_blocks, (pixels + rows - 1) / rows);
  }
  p.row_blocks = row_blocks;
  p.column_blocks = Maximum(Minimum((wanted + row_blocks - 1) / row_blocks, panels / 2), 1);
  const int64_t most = (pixels + row_blocks - 1) / row_blocks;
  const auto gathered = static_cast<int64_t>(most * LevelStride(depth) * sizeof(Level) / sizeof(float));
  p.scratch = kTileRows * kPanelColumns + (ReadsInPlace(p) ? 0 : gathered);
}

void RunQuantizedConv(const QuantizedConvPlan& plan, const QuantizedConvArrays& arrays, int64_t block,
                      float* scratch) {
  const int64_t pixels = plan.out_height * plan.out_width;
  const int64_t depth = Depth(plan);
  const int64_t panels = PanelCount(plan.out);
  const int64_t row_block = block / plan.column_blocks;
  const int64_t column_block = block % plan.column_blocks;
  const int64_t first = pixels * row_block / plan.row_blocks;
  const int64_t rows = pixels * (row_block + 1) / plan.row_blocks - first;
  auto* const sums = reinterpret_cast<int32_t*>(scratch);
  auto* const gathered = reinterpret_cast<Level*>(scratch + kTileRows * kPanelColumns);
  const Level* a = gathered;
  int64_t a_stride = LevelStride(depth);
  if (ReadsInPlace(plan)) {
    a = reinterpret_cast<const Level*>(arrays.x) + first * plan.in;
    a_stride = plan.in;
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pixel = first + r;
      GatherPixel(plan, arrays.x, pixel / plan.out_width, pixel % plan.out_width, gathered + r * a_stride);
    }
  }
  const FinishLevels finish = FinishLevelsOf(plan.activation, arrays.residual != nullptr);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t p = panels * column_block / plan.column_blocks; p < panels * (column_block + 1) / plan.column_blocks;
       ++p) {
    const Panel panel = PanelAt(arrays.weights, depth, p);
    const int64_t column = p * kPanelColumns;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = rows * tile / tiles;
      const int64_t count = rows * (tile + 1) / tiles - row;
      SumOfRows(count)({a + row * a_stride, a_stride, LevelGroups(depth), panel.weights, panel.start, sums});
      const int64_t at = (first + row) * plan.out + column;
      finish({sums, count, Minimum(kPanelColumns, plan.out - column), &panel,
              arrays.residual == nullptr ? nullptr : arrays.residual + at, arrays.y + at, plan.out, plan.y_zero});
    }
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
