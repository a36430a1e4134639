// How rows are split into blocks that threads claim. Included only by sources in kernels/.
#pragma once

#include "gemm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

// Blocks of at most 4 tiles of rows and of equal size, one or two or a multiple of four of them, so that two and four
// threads get equal shares.
ATTN_DEPLOY_INLINE int64_t RowBlocks(int64_t rows) {
  constexpr int64_t kRows = 56;
  const int64_t blocks = Maximum(1, (rows + kRows - 1) / kRows);
  return blocks <= 2 ? blocks : (blocks + 3) / 4 * 4;
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
