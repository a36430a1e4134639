#include "quantized_gate.h"

#include "dot.h"
#include "requantize.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Per channel, as Requantization has them: the gate's factors are made once for a block of pixels.
struct Factors {
  float* multiplier;
  float* bias;
  float* residual;
  const float* inverse;
};

void MakeFactors(const QuantizedGateArrays& g, Activation activation, const Factors& to) {
  const bool piecewise = IsPiecewise(activation);
  for (int64_t c = 0; c < g.channels; ++c) {
    const float unit = piecewise ? g.inverse[c] : 1.0f;
    to.multiplier[c] = g.x_scale[c] * g.gate[c] * unit;
    to.bias[c] = -static_cast<float>(g.x_zero) * to.multiplier[c] + (piecewise ? static_cast<float>(g.y_zero) : 0.0f);
    if (g.residual == nullptr) continue;
    to.residual[c] = g.residual_scale[c] * unit;
    to.bias[c] -= static_cast<float>(g.residual_zero) * to.residual[c];
  }
}

template <Activation kActivation, bool kResidual, bool kWhole>
ATTN_DEPLOY_INLINE void GateVector(const QuantizedGateArrays& g, const Factors& f, int64_t at, int64_t c) {
  const int64_t count = g.channels - c;
  const auto levels = [&](const uint8_t* p) { return kWhole ? LoadLevels(p) : LoadLevels(p, count); };
  const auto factors = [&](const float* p) { return kWhole ? Load(p + c) : LoadPartial(p + c, count); };
  Vec v = Fma(levels(g.x + at), factors(f.multiplier), factors(f.bias));
  if constexpr (kResidual) v = Fma(levels(g.residual + at), factors(f.residual), v);
  const Vec inverse = IsPiecewise(kActivation) ? Zero() : factors(f.inverse);
  v = LevelOf<kActivation>(v, inverse, static_cast<float>(g.y_zero), LeastLevel(kActivation, g.y_zero));
  if constexpr (kWhole) {
    StoreLevels(g.y + at, v);
  } else {
    StoreLevels(g.y + at, v, count);
  }
}

template <Activation kActivation, bool kResidual>
void GatePixels(const QuantizedGateArrays& g, const Factors& f, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t at = pixel * g.channels;
    int64_t c = 0;
    for (; c + kLanes <= g.channels; c += kLanes) GateVector<kActivation, kResidual, true>(g, f, at + c, c);
    if (c < g.channels) GateVector<kActivation, kResidual, false>(g, f, at + c, c);
  }
}

// Sums of kVectors vectors of channels: pixels are read in turn.
template <int kVectors>
void PoolVectors(const uint8_t* x, int64_t pixels, int64_t channels, const float* scale, uint8_t zero, float* mean) {
  // Levels are whole numbers: up to 65,793 of them sum up exactly in float32.
  constexpr int64_t kExact = 65536;
  double total[kVectors * kLanes] = {};
  for (int64_t first = 0; first < pixels; first += kExact) {
    Vec sum[kVectors];
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] = Zero();
    for (int64_t p = first; p < Minimum(first + kExact, pixels); ++p) {
      ATTN_DEPLOY_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + LoadLevels(x + p * channels + v * kLanes);
    }
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float lanes[kLanes];
      Store(lanes, sum[v]);
      for (int lane = 0; lane < kLanes; ++lane) total[v * kLanes + lane] += static_cast<double>(lanes[lane]);
    }
  }
  for (int64_t c = 0; c < kVectors * kLanes; ++c) {
    mean[c] = scale[c] * static_cast<float>(total[c] / static_cast<double>(pixels) - static_cast<double>(zero));
  }
}

void PoolRest(const uint8_t* x, int64_t pixels, int64_t channels, const float* scale, uint8_t zero, float* mean,
              int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    int64_t total = 0;
    for (int64_t p = 0; p < pixels; ++p) total += x[p * channels + c];
    mean[c] = scale[c] *
              static_cast<float>(static_cast<double>(total) / static_cast<double>(pixels) - static_cast<double>(zero));
  }
}

}  // namespace

int64_t QuantizedGateScratch(int64_t channels) { return 3 * ((channels + 15) / 16 * 16); }

void RunQuantizedGate(const QuantizedGateArrays& arrays, Activation activation, int64_t begin, int64_t end,
                      float* scratch) {
  const int64_t room = (arrays.channels + 15) / 16 * 16;
  const Factors factors = {scratch, scratch + room, scratch + 2 * room, arrays.inverse};
  MakeFactors(arrays, activation, factors);
  WithMapActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    if (arrays.residual != nullptr) return GatePixels<kActivation, true>(arrays, factors, begin, end);
    return GatePixels<kActivation, false>(arrays, factors, begin, end);
  });
}

void RunQuantizedPool(const uint8_t* x, int64_t pixels, int64_t channels, const float* scale, uint8_t zero,
                      int64_t begin, int64_t end, float* mean) {
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) PoolVectors<4>(x + c, pixels, channels, scale + c, zero, mean + c);
  for (; c + kLanes <= end; c += kLanes) PoolVectors<1>(x + c, pixels, channels, scale + c, zero, mean + c);
  if (c < end) PoolRest(x + c, pixels, channels, scale + c, zero, mean + c, end - c);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
