// The shape of a tensor, for kernels and adapters alike.
#pragma once

#include <cstdint>

namespace attn_deploy::native {

constexpr int kMaxRank = 8;

// `rank` is the tensor's own. Where it is above kMaxRank, which no kernel accepts, `dims` holds the first kMaxRank.
struct Shape {
  int64_t rank = 0;
  int64_t dims[kMaxRank] = {};
};

inline bool operator==(const Shape& a, const Shape& b) {
  if (a.rank != b.rank) return false;
  for (int64_t d = 0; d < a.rank && d < kMaxRank; ++d) {
    if (a.dims[d] != b.dims[d]) return false;
  }
  return true;
}

inline bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }

}  // namespace attn_deploy::native
