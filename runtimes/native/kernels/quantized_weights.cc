#include "quantized_weights.h"

#include "quantized_panel.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

constexpr int kZeroPoint = 128;

struct Matrix {
  const uint8_t* weight;
  int64_t in;
  int64_t out;
};

// The columns [column, column + columns) for the inputs [begin, end), and their sums.
void PackGroup(const Matrix& matrix, int64_t column, int64_t columns, int64_t begin, int64_t end, int32_t* minus_sums,
               PackedWeight* packed) {
  for (int64_t c = 0; c < kPanelColumns; ++c) minus_sums[c] = 0;
  for (int64_t first = begin; first < end; first += kGroup) {
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      for (int64_t i = first; i < first + kGroup; ++i) {
        const bool is_weight = i < end && c < columns;
        const int weight = is_weight ? matrix.weight[i * matrix.out + column + c] - kZeroPoint : 0;
        minus_sums[c] -= weight;
        *packed++ = static_cast<PackedWeight>(weight);
      }
    }
  }
}

void PackFloats(const float* from, int64_t columns, char* to) {
  auto* const packed = reinterpret_cast<float*>(to);
  for (int64_t c = 0; c < kPanelColumns; ++c) packed[c] = from != nullptr && c < columns ? from[c] : 0.0f;
}

}  // namespace

int64_t QuantizedWeightsSize(int64_t in, int64_t out, int64_t groups) {
  return (PanelCount(out) * QuantizedPanel(in, groups).stride + 63) / 64 * 64;
}

void PackQuantizedWeights(const uint8_t* weight, const float* weight_scale, const float* bias, int64_t in, int64_t out,
                          int64_t groups, void* packed) {
  const QuantizedPanel layout(in, groups);
  const int64_t inputs = in / groups;
  char* panel = static_cast<char*>(packed);
  for (int64_t column = 0; column < out; column += kPanelColumns, panel += layout.stride) {
    const int64_t columns = Minimum(kPanelColumns, out - column);
    PackFloats(weight_scale + column, columns, panel);
    PackFloats(bias != nullptr ? bias + column : nullptr, columns, panel + QuantizedPanel::kFloats);
    for (int64_t g = 0; g < groups; ++g) {
      PackGroup({weight, in, out}, column, columns, g * inputs, (g + 1) * inputs,
                const_cast<int32_t*>(layout.MinusSums(panel, g)), const_cast<PackedWeight*>(layout.Weights(panel, g)));
    }
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
