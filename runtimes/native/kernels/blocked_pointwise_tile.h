// A tile of a 1x1 convolution in registers: pixels x output blocks. Included only by sources in kernels/.
#pragma once

#include "blocked.h"
#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Vectors of output channels in a tile, and pixels for each number of them: the accumulators, one vector of weights for
// each, and a broadcast that x86 takes from memory, stay in the registers.
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

constexpr int TilePixels(int vectors) {
  if constexpr (kRegisters == 32) return vectors == 1 ? 14 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 10 : 6;
}

struct PointwiseTile {
  const float* x;  // [depth / block, pixels of the map, block]
  int64_t x_stride;  // from one block of channels to the next
  const float* weight;  // [depth, block] for each output block
  int64_t weight_stride;  // from one output block to the next
  int64_t depth;          // input channels, a multiple of the block
  const float* bias;      // [output blocks, block], or null: adds to what stands in y
  float* y;               // [output blocks, pixels of the map, block]
  int64_t y_stride;
};

// kBlocks output blocks of kVectors vectors each.
template <int kPixels, int kBlocks, int kVectors>
void MultiplyPixels(const PointwiseTile& tile) {
  constexpr int kColumns = kBlocks * kVectors;
  constexpr int64_t kBlock = kVectors * kLanes;
  Vec sum[kPixels][kColumns];
  ATTN_DEPLOY_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    ATTN_DEPLOY_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int64_t lane = c % kVectors * kLanes;
      sum[p][c] = tile.bias != nullptr ? Load(tile.bias + c * kLanes)
                                       : Load(tile.y + c / kVectors * tile.y_stride + p * kBlock + lane);
    }
  }
  const float* x = tile.x;
  const float* weight = tile.weight;
  for (int64_t depth = tile.depth; depth > 0; depth -= kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) {
      Vec w[kColumns];
      ATTN_DEPLOY_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        w[c] = Load(weight + c / kVectors * tile.weight_stride + c % kVectors * kLanes);
      }
      weight += kBlock;
      ATTN_DEPLOY_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const Vec value = Broadcast(x[p * kBlock + i]);
        ATTN_DEPLOY_UNROLL
        for (int c = 0; c < kColumns; ++c) sum[p][c] = Fma(value, w[c], sum[p][c]);
      }
    }
    x += tile.x_stride;
  }
  ATTN_DEPLOY_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    ATTN_DEPLOY_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      Store(tile.y + c / kVectors * tile.y_stride + p * kBlock + c % kVectors * kLanes, sum[p][c]);
    }
  }
}

using PixelsFunction = void (*)(const PointwiseTile& tile);

// MultiplyPixels for `pixels` in [1, TilePixels].
template <int kBlocks, int kVectors>
ATTN_DEPLOY_INLINE PixelsFunction PixelsOf(int64_t pixels) {
  constexpr int kMost = TilePixels(kBlocks * kVectors);
  switch (pixels) {
#define ATTN_DEPLOY_PIXELS(n) \
  case n:                     \
    return MultiplyPixels<(n <= kMost ? n : kMost), kBlocks, kVectors>;
    ATTN_DEPLOY_PIXELS(1)
    ATTN_DEPLOY_PIXELS(2)
    ATTN_DEPLOY_PIXELS(3)
    ATTN_DEPLOY_PIXELS(4)
    ATTN_DEPLOY_PIXELS(5)
    ATTN_DEPLOY_PIXELS(6)
    ATTN_DEPLOY_PIXELS(7)
    ATTN_DEPLOY_PIXELS(8)
    ATTN_DEPLOY_PIXELS(9)
    ATTN_DEPLOY_PIXELS(10)
    ATTN_DEPLOY_PIXELS(11)
    ATTN_DEPLOY_PIXELS(12)
    ATTN_DEPLOY_PIXELS(13)
#undef ATTN_DEPLOY_PIXELS
    default:
      return MultiplyPixels<kMost, kBlocks, kVectors>;
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
