#include "blocked_gate.h"

#include "blocked.h"
#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

template <Activation kActivation, int kVectors, bool kHasResidual, bool kPerPixel>
void RunGate(int64_t pixels, const BlockedGateArrays& arrays) {
  const float* const x = arrays.x;
  const float* const residual = arrays.residual;
  float* const output = arrays.output;
  Vec gate[kVectors];
  ATTN_DEPLOY_UNROLL
  for (int v = 0; v < kVectors; ++v) gate[v] = kPerPixel ? Zero() : Load(arrays.gate + v * kLanes);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const Vec pixel_gate = kPerPixel ? Broadcast(arrays.gate[pixel]) : Zero();
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (pixel * kVectors + v) * kLanes;
      const Vec factor = kPerPixel ? pixel_gate : gate[v];
      const Vec gated = kHasResidual ? Fma(Load(x + at), factor, Load(residual + at)) : Load(x + at) * factor;
      Store(output + at, Activated<kActivation>(gated));
    }
  }
}

template <Activation kActivation, int kVectors, bool kPadded>
void RunActivate(int64_t channels, int64_t pixels, const float* x, float* y) {
  const Vec lanes = LaneNumbers();
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (pixel * kVectors + v) * kLanes;
      Vec activated = Activated<kActivation>(Load(x + at));
      if constexpr (kPadded) {
        activated = IfLess(lanes, Broadcast(static_cast<float>(channels - v * kLanes)), activated, Zero());
      }
      Store(y + at, activated);
    }
  }
}

}  // namespace

void BlockedGate(Activation activation, bool per_pixel, int64_t block, int64_t pixels,
                 const BlockedGateArrays& arrays) {
  const bool has_residual = arrays.residual != nullptr;
  WithActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    WithVectorsOf(block, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      if (has_residual && per_pixel) return RunGate<kActivation, kVectors, true, true>(pixels, arrays);
      if (has_residual) return RunGate<kActivation, kVectors, true, false>(pixels, arrays);
      if (per_pixel) return RunGate<kActivation, kVectors, false, true>(pixels, arrays);
      return RunGate<kActivation, kVectors, false, false>(pixels, arrays);
    });
  });
}

void BlockedActivate(Activation activation, int64_t block, int64_t channels, int64_t pixels, const float* x,
                     float* y) {
  WithActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    WithVectorsOf(block, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      if (channels < block) return RunActivate<kActivation, kVectors, true>(channels, pixels, x, y);
      return RunActivate<kActivation, kVectors, false>(channels, pixels, x, y);
    });
  });
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
