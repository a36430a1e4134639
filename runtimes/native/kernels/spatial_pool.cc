#include "spatial_pool.h"

#include "vector_sums.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Channels that are summed plainly before they go to the compensated sum.
constexpr int64_t kTerms = 16;
// Vectors of pixels that a pass over the channels takes: as many bytes of each row as registers allow.
constexpr int kWidest = kRegisters / 4;

template <bool kMean, bool kMaximum, int kVectors, typename LoadPixels>
ATTN_DEPLOY_INLINE void PoolColumns(const float* x, int64_t channels, int64_t stride, const LoadPixels& load,
                                    Vec (&mean)[kVectors], Vec (&maximum)[kVectors]) {
  CompensatedSum totals[kVectors];
  ATTN_DEPLOY_UNROLL
  for (int v = 0; v < kVectors; ++v) maximum[v] = Broadcast(-__builtin_inff());
  for (int64_t c = 0; c < channels;) {
    const int64_t end = Minimum(c + kTerms, channels);
    Vec sums[kVectors];
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[v] = Zero();
    for (; c < end; ++c, x += stride) {
      ATTN_DEPLOY_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Vec pixels = load(x + v * kLanes);
        if constexpr (kMean) sums[v] = sums[v] + pixels;
        if constexpr (kMaximum) maximum[v] = MaxOrNan(maximum[v], pixels);
      }
    }
    if constexpr (kMean) {
      ATTN_DEPLOY_UNROLL
      for (int v = 0; v < kVectors; ++v) totals[v].Add(sums[v]);
    }
  }
  ATTN_DEPLOY_UNROLL
  for (int v = 0; v < kVectors; ++v) mean[v] = totals[v].Total() / Broadcast(static_cast<float>(channels));
}

// The columns of one call; `pixels` counts those that are left.
struct Columns {
  const float* x;
  int64_t channels;
  int64_t stride;
  int64_t pixels;
  float* mean;
  float* maximum;
};

template <bool kMean, bool kMaximum, int kVectors>
void PoolWholeVectors(Columns* c) {
  constexpr int kPixels = kVectors * kLanes;
  for (; c->pixels >= kPixels; c->pixels -= kPixels, c->x += kPixels) {
    Vec mean[kVectors], maximum[kVectors];
    PoolColumns<kMean, kMaximum>(c->x, c->channels, c->stride, [](const float* p) { return Load(p); }, mean, maximum);
    ATTN_DEPLOY_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kMean) Store(c->mean + v * kLanes, mean[v]);
      if constexpr (kMaximum) Store(c->maximum + v * kLanes, maximum[v]);
    }
    if constexpr (kMean) c->mean += kPixels;
    if constexpr (kMaximum) c->maximum += kPixels;
  }
}

template <bool kMean, bool kMaximum>
void Run(Columns c) {
  PoolWholeVectors<kMean, kMaximum, kWidest>(&c);
  PoolWholeVectors<kMean, kMaximum, 2>(&c);
  PoolWholeVectors<kMean, kMaximum, 1>(&c);
  if (c.pixels == 0) return;
  Vec mean[1], maximum[1];
  const auto load = [&](const float* p) { return LoadPartial(p, c.pixels); };
  PoolColumns<kMean, kMaximum>(c.x, c.channels, c.stride, load, mean, maximum);
  if constexpr (kMean) StorePartial(c.mean, mean[0], c.pixels);
  if constexpr (kMaximum) StorePartial(c.maximum, maximum[0], c.pixels);
}

}  // namespace

void SpatialPool(const float* x, int64_t channels, int64_t stride, int64_t pixels, float* mean, float* maximum) {
  const Columns columns = {x, channels, stride, pixels, mean, maximum};
  if (mean != nullptr && maximum != nullptr) return Run<true, true>(columns);
  if (mean != nullptr) return Run<true, false>(columns);
  if (maximum != nullptr) return Run<false, true>(columns);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
