#include "blocked_pointwise.h"

#include "blocked_pointwise_tile.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Floats of weights that tiles of all pixels share before the next channels' come: half of a 32 KiB L1 cache.
constexpr int64_t kSliceFloats = 4096;

ATTN_DEPLOY_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// y = activation(gate * y + residual) on the pixels of one output block.
template <Activation kActivation, int kVectors>
void Finish(const float* gate, const float* residual, int64_t pixels, float* y) {
  ATTN_DEPLOY_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec scale = gate == nullptr ? Broadcast(1.0f) : Load(gate + v * kLanes);
    for (int64_t at = v * kLanes; at < pixels * kVectors * kLanes; at += kVectors * kLanes) {
      Vec value = Load(y + at);
      if (gate != nullptr) value = value * scale;
      if (residual != nullptr) value = value + Load(residual + at);
      Store(y + at, Activated<kActivation>(value));
    }
  }
}

template <int kVectors>
ATTN_DEPLOY_INLINE void FinishTile(const PointwiseParams& p, int64_t first_block, int64_t blocks, int64_t first_pixel,
                                   int64_t pixels) {
  if (p.output_gate == nullptr && p.residual == nullptr && p.activation == Activation::kNone) return;
  WithActivation(p.activation, [&](auto form) {
    for (int64_t b = first_block; b < first_block + blocks; ++b) {
      const int64_t at = (b * p.pixels + first_pixel) * p.block;
      Finish<decltype(form)::value, kVectors>(p.output_gate == nullptr ? nullptr : p.output_gate + b * p.block,
                                              p.residual == nullptr ? nullptr : p.residual + at, pixels, p.y + at);
    }
  });
}

// scaled = weight, [blocks, channels, block], times the gate of its input channel.
template <int kVectors>
void ScaleWeights(const float* weight, const float* gate, int64_t blocks, int64_t channels, float* scaled) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < channels; ++i) {
      const Vec scale = Broadcast(gate[i]);
      ATTN_DEPLOY_UNROLL
      for (int v = 0; v < kVectors; ++v) Store(scaled + v * kLanes, Load(weight + v * kLanes) * scale);
      scaled += kVectors * kLanes;
      weight += kVectors * kLanes;
    }
  }
}

// kBlocks output blocks from `first_block` on, over a range of pixels.
template <int kBlocks, int kVectors>
void RunGroup(const PointwiseParams& p, int64_t first_block, int64_t first_pixel, int64_t last_pixel, float* scratch) {
  constexpr int64_t kBlock = kVectors * kLanes;
  constexpr int64_t kMost = TilePixels(kBlocks * kVectors);
  constexpr int64_t kSlice = kSliceFloats / (kBlocks * kBlock) / kBlock * kBlock;
  const int64_t channels = p.in_blocks * kBlock;
  const float* weight = p.weight + first_block * channels * kBlock;
  if (p.input_gate != nullptr) {
    ScaleWeights<kVectors>(weight, p.input_gate, kBlocks, channels, scratch);
    weight = scratch;
  }
  // Tiles of nearly the same size: a last one of a pixel or two would wait for its sums.
  const int64_t pixels = last_pixel - first_pixel;
  const int64_t tiles = (pixels + kMost - 1) / kMost;
  for (int64_t from = 0; from < channels; from += kSlice) {
    const int64_t depth = Smaller(kSlice, channels - from);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = first_pixel + pixels * t / tiles;
      const int64_t end = first_pixel + pixels * (t + 1) / tiles;
      PixelsOf<kBlocks, kVectors>(end - begin)({
          p.x + (from / kBlock * p.pixels + begin) * kBlock, p.pixels * kBlock, weight + from * kBlock,
          channels * kBlock, depth, from == 0 ? p.bias + first_block * kBlock : nullptr,
          p.y + (first_block * p.pixels + begin) * kBlock, p.pixels * kBlock});
      if (from + depth == channels) FinishTile<kVectors>(p, first_block, kBlocks, begin, end - begin);
    }
  }
}

}  // namespace

int64_t PointwiseGroup(int64_t block) {
  const int64_t vectors = block / kLanes;
  return vectors < kTileVectors ? kTileVectors / vectors : 1;
}

int64_t PointwiseScratch(const PointwiseParams& p) {
  return p.input_gate == nullptr ? 0 : PointwiseGroup(p.block) * p.in_blocks * p.block * p.block;
}

void BlockedPointwise(const PointwiseParams& p, int64_t first_block, int64_t last_block, int64_t first_pixel,
                      int64_t last_pixel, float* scratch) {
  WithVectorsOf(p.block, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    constexpr int kMost = kVectors < kTileVectors ? kTileVectors / kVectors : 1;
    for (int64_t b = first_block; b < last_block; b += kMost) {
      const int64_t left = last_block - b;
      if constexpr (kMost >= 4) {
        if (left >= 4) {
          RunGroup<4, kVectors>(p, b, first_pixel, last_pixel, scratch);
          continue;
        }
        if (left == 3) {
          RunGroup<3, kVectors>(p, b, first_pixel, last_pixel, scratch);
          continue;
        }
      }
      if constexpr (kMost >= 2) {
        if (left >= 2) {
          RunGroup<2, kVectors>(p, b, first_pixel, last_pixel, scratch);
          continue;
        }
      }
      RunGroup<1, kVectors>(p, b, first_pixel, last_pixel, scratch);
    }
  });
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
