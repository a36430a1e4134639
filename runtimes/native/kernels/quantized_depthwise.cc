// A vector of channels at a time: the rows that an output row reads are kept as floats in L1, so that each level is
// converted once for all taps. Levels and weights are small integers and their sums stay below 2^24: float32 holds them
// exactly, whatever the order.
#include "quantized_depthwise.h"

#include "requantize.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

constexpr int kOutputs = 8;  // summed together, which hides the latency of an FMA
constexpr int64_t kConstants = 4;

// Of one vector of channels: multipliers, biases, residual multipliers, inverses, weights [taps, taps, kLanes].
ATTN_DEPLOY_INLINE int64_t PartFloats(int64_t taps) { return (kConstants + taps * taps) * kLanes; }

ATTN_DEPLOY_INLINE int64_t Vectors(int64_t channels) { return (channels + kLanes - 1) / kLanes; }

// Of the window's rows: what an output row reads, and at least the padding and the map's width.
ATTN_DEPLOY_INLINE int64_t RowPixels(const QuantizedConvPlan& p) {
  return Maximum((p.out_width - 1) * p.stride + p.kernel_width, p.pad_left + p.width);
}

template <int kCount, int kStride>
void SumTaps(const float* const* rows, int64_t column, int64_t taps, const float* weight, float* y) {
  Vec sum[kCount];
  ATTN_DEPLOY_UNROLL
  for (int i = 0; i < kCount; ++i) sum[i] = Zero();
  for (int64_t down = 0; down < taps; ++down) {
    const float* x = rows[down] + column * kStride * kLanes;
    for (int64_t across = 0; across < taps; ++across) {
      const Vec value = Load(weight);
      ATTN_DEPLOY_UNROLL
      for (int i = 0; i < kCount; ++i) sum[i] = Fma(value, Load(x + i * kStride * kLanes), sum[i]);
      x += kLanes;
      weight += kLanes;
    }
  }
  ATTN_DEPLOY_UNROLL
  for (int i = 0; i < kCount; ++i) Store(y + i * kLanes, sum[i]);
}

using TapsFunction = void (*)(const float* const*, int64_t, int64_t, const float*, float*);

template <int kStride>
ATTN_DEPLOY_INLINE TapsFunction TapsOf(int64_t count) {
  static constexpr TapsFunction kFunctions[] = {
      SumTaps<1, kStride>, SumTaps<2, kStride>, SumTaps<3, kStride>, SumTaps<4, kStride>,
      SumTaps<5, kStride>, SumTaps<6, kStride>, SumTaps<7, kStride>, SumTaps<8, kStride>,
  };
  static_assert(sizeof(kFunctions) / sizeof(kFunctions[0]) == kOutputs, "a function for each count");
  return kFunctions[count - 1];
}

// Row r of the map, `count` channels from `channel` on, less the zero point.
void MakeRow(const QuantizedConvPlan& p, const uint8_t* x, int64_t r, int64_t channel, int64_t count, float* row) {
  const Vec zero = Broadcast(static_cast<float>(p.x_zero));
  x += r * p.width * p.in + channel;
  row += p.pad_left * kLanes;
  if (count == kLanes) {
    for (int64_t i = 0; i < p.width; ++i) Store(row + i * kLanes, LoadLevels(x + i * p.in) - zero);
  } else {
    for (int64_t i = 0; i < p.width; ++i) Store(row + i * kLanes, LoadLevels(x + i * p.in, count) - zero);
  }
}

struct Finish {
  const float* sums;  // [out_width, kLanes]
  int64_t width;
  int64_t count;      // channels
  const float* part;
  const uint8_t* residual;  // or null
  uint8_t* y;
  int64_t stride;
  uint8_t zero;
};

template <Activation kActivation, bool kResidual>
void FinishRow(const Finish& f) {
  const Vec multiplier = Load(f.part);
  const Vec bias = Load(f.part + kLanes);
  const Vec residual_multiplier = Load(f.part + 2 * kLanes);
  const Vec inverse = Load(f.part + 3 * kLanes);
  const auto zero = static_cast<float>(f.zero);
  const float low = LeastLevel(kActivation, f.zero);
  const bool whole = f.count == kLanes;
  for (int64_t i = 0; i < f.width; ++i) {
    Vec v = Fma(Load(f.sums + i * kLanes), multiplier, bias);
    if constexpr (kResidual) {
      const uint8_t* residual = f.residual + i * f.stride;
      v = Fma(whole ? LoadLevels(residual) : LoadLevels(residual, f.count), residual_multiplier, v);
    }
    v = LevelOf<kActivation>(v, inverse, zero, low);
    if (whole) {
      StoreLevels(f.y + i * f.stride, v);
    } else {
      StoreLevels(f.y + i * f.stride, v, f.count);
    }
  }
}

using FinishFunction = void (*)(const Finish& finish);

ATTN_DEPLOY_INLINE FinishFunction FinishOf(Activation activation, bool residual) {
  FinishFunction function = nullptr;
  WithMapActivation(activation, [&](auto form) {
    function = residual ? FinishRow<form.value, true> : FinishRow<form.value, false>;
  });
  return function;
}

// Output rows [first, last) of one vector of channels.
void RunVector(const QuantizedConvPlan& p, const QuantizedConvArrays& arrays, int64_t vector, int64_t first,
               int64_t last, float* scratch) {
  const int64_t channel = vector * kLanes;
  const int64_t count = Minimum(kLanes, p.in - channel);
  const int64_t taps = p.kernel_height;
  const float* part = static_cast<const float*>(arrays.weights) + vector * PartFloats(taps);
  const int64_t row_floats = RowPixels(p) * kLanes;
  float* const zeros = scratch + taps * row_floats;
  float* const sums = zeros + row_floats;
  const FinishFunction finish = FinishOf(p.activation, arrays.residual != nullptr);
  const int64_t tiles = (p.out_width + kOutputs - 1) / kOutputs;
  int64_t made = Maximum(first * p.stride - p.pad_top, 0);
  for (int64_t r = first; r < last; ++r) {
    const int64_t top = r * p.stride - p.pad_top;
    for (made = Maximum(made, top); made < top + taps && made < p.height; ++made) {
      MakeRow(p, arrays.x, made, channel, count, scratch + made % taps * row_floats);
    }
    const float* rows[kMostDepthwiseTaps];
    for (int64_t down = 0; down < taps; ++down) {
      const int64_t at = top + down;
      rows[down] = at < 0 || at >= p.height ? zeros : scratch + at % taps * row_floats;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = p.out_width * t / tiles;
      const int64_t end = p.out_width * (t + 1) / tiles;
      const auto sum = p.stride == 1 ? TapsOf<1>(end - begin) : TapsOf<2>(end - begin);
      sum(rows, begin, taps, part + kConstants * kLanes, sums + begin * kLanes);
    }
    const int64_t at = r * p.out_width * p.out + channel;
    finish({sums, p.out_width, count, part, arrays.residual == nullptr ? nullptr : arrays.residual + at, arrays.y + at,
            p.out, p.y_zero});
  }
}

// Multiply-adds of a block of work: about 10 us.
constexpr int64_t kMultiplyAddsPerBlock = 256 * 1024;
constexpr int64_t kMostBlocks = 32;

}  // namespace

int64_t QuantizedDepthwiseSize(int64_t taps, int64_t channels) { return Vectors(channels) * PartFloats(taps); }

void PackQuantizedDepthwise(const uint8_t* weight, const Requantization& requantization, int64_t taps,
                            int64_t channels, float* packed) {
  const float* const constants[kConstants] = {requantization.multiplier, requantization.bias,
                                              requantization.residual_multiplier, requantization.inverse};
  const int64_t area = taps * taps;
  for (int64_t c = 0; c < Vectors(channels) * kLanes; ++c) {
    float* const to = packed + c / kLanes * PartFloats(taps) + c % kLanes;
    for (int64_t i = 0; i < kConstants; ++i) {
      to[i * kLanes] = c < channels && constants[i] != nullptr ? constants[i][c] : 0.0f;
    }
    for (int64_t i = 0; i < area; ++i) {
      to[(kConstants + i) * kLanes] = c < channels ? static_cast<float>(weight[c * area + i] - 128) : 0.0f;
    }
  }
}

void PlanQuantizedDepthwise(QuantizedConvPlan* plan) {
  QuantizedConvPlan& p = *plan;
  const int64_t work = p.out_height * p.out_width * p.out * p.kernel_height * p.kernel_width;
  // A block makes up to kernel_height - 1 rows that its neighbour makes too.
  const int64_t most = Maximum(p.out_height / 3, 1);
  p.row_blocks = Minimum(Minimum(Maximum(work / kMultiplyAddsPerBlock, 1), kMostBlocks), most);
  p.column_blocks = 1;
  p.scratch = (p.kernel_height + 1) * RowPixels(p) * kLanes + p.out_width * kLanes;
}

void RunQuantizedDepthwise(const QuantizedConvPlan& plan, const QuantizedConvArrays& arrays, int64_t block,
                           float* scratch) {
  const int64_t floats = (plan.kernel_height + 1) * RowPixels(plan) * kLanes;
  for (int64_t i = 0; i < floats; i += kLanes) Store(scratch + i, Zero());  // padding at both sides stays 0
  const int64_t first = plan.out_height * block / plan.row_blocks;
  const int64_t last = plan.out_height * (block + 1) / plan.row_blocks;
  for (int64_t v = 0; v < Vectors(plan.out); ++v) RunVector(plan, arrays, v, first, last, scratch);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
