#include "excite.h"

#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

constexpr int kPanelVectors = static_cast<int>(kExcitePanel / kLanes);

// Dot products of four rows, `stride` floats apart, with p.
ATTN_DEPLOY_INLINE void DotFour(const float* p, const float* rows, int64_t stride, int64_t count, float* result) {
  Vec sums[4] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec v = Load(p + i);
    ATTN_DEPLOY_UNROLL
    for (int row = 0; row < 4; ++row) sums[row] = Fma(v, Load(rows + row * stride + i), sums[row]);
  }
  if (i < count) {
    const Vec v = LoadPartial(p + i, count - i);
    ATTN_DEPLOY_UNROLL
    for (int row = 0; row < 4; ++row) sums[row] = Fma(v, LoadPartial(rows + row * stride + i, count - i), sums[row]);
  }
  ATTN_DEPLOY_UNROLL
  for (int row = 0; row < 4; ++row) result[row] = ReduceAdd(sums[row]);
}

float Dot(const float* p, const float* row, int64_t count) {
  Vec sums[4] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < 4; ++v) sums[v] = Fma(Load(p + i + v * kLanes), Load(row + i + v * kLanes), sums[v]);
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] = Fma(Load(p + i), Load(row + i), sums[0]);
  if (i < count) sums[1] = Fma(LoadPartial(p + i, count - i), LoadPartial(row + i, count - i), sums[1]);
  return ReduceAdd((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Activation kActivation>
void StoreGate(const Vec (&sums)[kPanelVectors], const float* bias, int64_t channels, float* gate) {
  for (int v = 0; v < kPanelVectors && v * kLanes < channels; ++v) {
    const Vec activated = Activated<kActivation>(sums[v] + Load(bias + v * kLanes));
    const int64_t left = channels - v * kLanes;
    if (left >= kLanes) {
      Store(gate + v * kLanes, activated);
    } else {
      StorePartial(gate + v * kLanes, activated, left);
    }
  }
}

}  // namespace

void ExciteHidden(Activation activation, const float* pooled, const float* weight, const float* bias, int64_t channels,
                  int64_t begin, int64_t end, float* hidden) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) DotFour(pooled, weight + r * channels, channels, channels, hidden + r);
  for (; r < end; ++r) hidden[r] = Dot(pooled, weight + r * channels, channels);
  WithActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t count = Minimum(kLanes, end - i);
      StorePartial(hidden + i, Activated<kActivation>(LoadPartial(hidden + i, count) + LoadPartial(bias + i, count)),
                   count);
    }
  });
}

void ExciteGate(Activation activation, const float* hidden, const float* weight, const float* bias, int64_t reduced,
                int64_t channels, float* gate) {
  Vec sums[kPanelVectors];
  ATTN_DEPLOY_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) sums[v] = Zero();
  for (int64_t r = 0; r < reduced; ++r) {
    const Vec h = Broadcast(hidden[r]);
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) sums[v] = Fma(h, Load(weight + r * kExcitePanel + v * kLanes), sums[v]);
  }
  WithActivation(activation, [&](auto form) { StoreGate<decltype(form)::value>(sums, bias, channels, gate); });
}

void EcaGate(Activation activation, const float* padded, const float* weight, int64_t taps, int64_t channels,
             float* gate) {
  WithActivation(activation, [&](auto form) {
    constexpr Activation kActivation = decltype(form)::value;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = Minimum(kLanes, channels - c);
      Vec sum = Zero();
      for (int64_t j = 0; j < taps; ++j) sum = Fma(Broadcast(weight[j]), LoadPartial(padded + c + j, count), sum);
      StorePartial(gate + c, Activated<kActivation>(sum), count);
    }
  });
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
