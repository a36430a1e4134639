#include "packed_weights.h"

#include "gemm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

void PackRow(const float* row, int64_t columns, float* packed) {
  for (int64_t c = 0; c < kPanelColumns; ++c) packed[c] = row != nullptr && c < columns ? row[c] : 0.0f;
}

}  // namespace

int64_t PackedWeightsSize(int64_t in, int64_t out) { return PanelCount(out) * PanelStride(in); }

void PackWeights(const float* weight, const float* bias, int64_t in, int64_t out, float* packed) {
  for (int64_t column = 0; column < out; column += kPanelColumns) {
    const int64_t columns = Minimum(kPanelColumns, out - column);
    PackRow(bias != nullptr ? bias + column : nullptr, columns, packed);
    packed += kPanelColumns;
    for (int64_t i = 0; i < in; ++i, packed += kPanelColumns) PackRow(weight + i * out + column, columns, packed);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
