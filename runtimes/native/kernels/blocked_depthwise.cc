#include "blocked_depthwise.h"

#include "blocked_pointwise_tile.h"
#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Outputs that are summed together: as many accumulators hide the latency of an FMA.
constexpr int kOutputs = 8;

ATTN_DEPLOY_INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of x with room for the padding at both sides: what one output row reads, and the zeros beyond the map.
struct Window {
  int64_t row_floats;
  int64_t taps;
  float* rows;  // [taps, row_floats]: row r of the map stands at r % taps
  float* zeros;  // [row_floats]

  const float* Row(int64_t r, int64_t height) const {
    return r < 0 || r >= height ? zeros : rows + r % taps * row_floats;
  }
};

ATTN_DEPLOY_INLINE int64_t RowFloats(const DepthwiseParams& p) {
  const int64_t read = (p.out_width - 1) * p.stride + p.taps;
  return Larger(read, p.pad_left + p.width) * p.block;
}

// kCount outputs of one row; `rows` are the `taps` rows that it reads, from the first output's column on.
template <int kCount, int kStride, int kVectors>
void SumTaps(const float* const* rows, int64_t column, int64_t taps, const float* weight, const float* bias, float* y) {
  constexpr int64_t kBlock = kVectors * kLanes;
  for (int64_t lane = 0; lane < kBlock; lane += kLanes) {
    Vec sum[kCount];
    ATTN_DEPLOY_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] = Load(bias + lane);
    for (int64_t down = 0; down < taps; ++down) {
      const float* x = rows[down] + column * kStride * kBlock + lane;
      const float* w = weight + down * taps * kBlock + lane;
      for (int64_t across = 0; across < taps; ++across) {
        const Vec value = Load(w);
        ATTN_DEPLOY_UNROLL
        for (int i = 0; i < kCount; ++i) sum[i] = Fma(value, Load(x + i * kStride * kBlock), sum[i]);
        x += kBlock;
        w += kBlock;
      }
    }
    ATTN_DEPLOY_UNROLL
    for (int i = 0; i < kCount; ++i) Store(y + i * kBlock + lane, sum[i]);
  }
}

using TapsFunction = void (*)(const float* const*, int64_t, int64_t, const float*, const float*, float*);

template <int kStride, int kVectors>
ATTN_DEPLOY_INLINE TapsFunction TapsOf(int64_t count) {
  static constexpr TapsFunction kFunctions[] = {
      SumTaps<1, kStride, kVectors>, SumTaps<2, kStride, kVectors>, SumTaps<3, kStride, kVectors>,
      SumTaps<4, kStride, kVectors>, SumTaps<5, kStride, kVectors>, SumTaps<6, kStride, kVectors>,
      SumTaps<7, kStride, kVectors>, SumTaps<8, kStride, kVectors>,
  };
  static_assert(sizeof(kFunctions) / sizeof(kFunctions[0]) == kOutputs, "a function for each count");
  return kFunctions[count - 1];
}

template <int kVectors>
void ActivateRow(Activation activation, int64_t width, float* row, CompensatedSum* sums) {
  WithActivation(activation, [&](auto form) {
    for (int v = 0; v < kVectors; ++v) {
      Vec sum = Zero();
      for (int64_t at = v * kLanes; at < width * kVectors * kLanes; at += kVectors * kLanes) {
        const Vec value = Activated<decltype(form)::value>(Load(row + at));
        Store(row + at, value);
        sum = sum + value;
      }
      if (sums != nullptr) sums[v].Add(sum);
    }
  });
}

// Row r of the map into the window.
template <int kVectors>
void MakeRow(const DepthwiseParams& p, int64_t r, float* row) {
  constexpr int64_t kBlock = kVectors * kLanes;
  constexpr int64_t kMost = TilePixels(kVectors);
  row += p.pad_left * kBlock;
  if (p.x != nullptr) {
    const float* x = p.x + r * p.width * kBlock;
    for (int64_t i = 0; i < p.width * kBlock; i += kLanes) Store(row + i, Load(x + i));
    return;
  }
  const int64_t tiles = (p.width + kMost - 1) / kMost;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = p.width * t / tiles;
    const int64_t end = p.width * (t + 1) / tiles;
    PixelsOf<1, kVectors>(end - begin)({p.input + (r * p.width + begin) * kBlock, p.height * p.width * kBlock,
                                        p.expand_weight, 0, p.in_blocks * kBlock, p.expand_bias, row + begin * kBlock,
                                        0});
  }
  ActivateRow<kVectors>(p.expand_activation, p.width, row, nullptr);
}

template <int kVectors>
void Run(const DepthwiseParams& p, int64_t first, int64_t last, float* scratch, float* sums) {
  constexpr int64_t kBlock = kVectors * kLanes;
  constexpr int64_t kMostTaps = 16;
  const Window window = {RowFloats(p), p.taps, scratch, scratch + p.taps * RowFloats(p)};
  for (int64_t i = 0; i < (p.taps + 1) * window.row_floats; i += kLanes) Store(scratch + i, Zero());
  CompensatedSum totals[kVectors];
  int64_t made = Larger(first * p.stride - p.pad_top, 0);  // the next row of the map to make
  const int64_t tiles = (p.out_width + kOutputs - 1) / kOutputs;
  for (int64_t r = first; r < last; ++r) {
    const int64_t top = r * p.stride - p.pad_top;
    for (made = Larger(made, top); made < top + p.taps && made < p.height; ++made) {
      MakeRow<kVectors>(p, made, window.rows + made % p.taps * window.row_floats);
    }
    const float* rows[kMostTaps];
    for (int64_t down = 0; down < p.taps; ++down) rows[down] = window.Row(top + down, p.height);
    float* y = p.y + r * p.out_width * kBlock;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = p.out_width * t / tiles;
      const int64_t end = p.out_width * (t + 1) / tiles;
      const auto sum = p.stride == 1 ? TapsOf<1, kVectors>(end - begin) : TapsOf<2, kVectors>(end - begin);
      sum(rows, begin, p.taps, p.weight, p.bias, y + begin * kBlock);
    }
    if (p.activation != Activation::kNone || sums != nullptr) {
      ActivateRow<kVectors>(p.activation, p.out_width, y, totals);
    }
  }
  if (sums == nullptr) return;
  for (int v = 0; v < kVectors; ++v) Store(sums + v * kLanes, totals[v].Total());
}

}  // namespace

int64_t DepthwiseScratch(const DepthwiseParams& p) { return (p.taps + 1) * RowFloats(p); }

void BlockedDepthwise(const DepthwiseParams& p, int64_t first, int64_t last, float* scratch, float* sums) {
  WithVectorsOf(p.block, [&](auto vectors) { Run<decltype(vectors)::value>(p, first, last, scratch, sums); });
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
