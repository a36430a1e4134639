// What kernels on the blocked layout share. Included only by sources in kernels/.
#pragma once

#include "simd.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

template <int kCount>
struct Vectors {
  static constexpr int value = kCount;
};

// body(Vectors<block / kLanes>{}): how many vectors hold the channels of one pixel.
template <typename Body>
ATTN_DEPLOY_INLINE void WithVectorsOf(int64_t block, const Body& body) {
  switch (block / kLanes) {
    case 1:
      return body(Vectors<1>{});
    case 2:
      return body(Vectors<2>{});
    case 4:
      return body(Vectors<4>{});
    default:
      return;  // adapters let no other block through
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
