#include "quantized_attention_block.h"

#include "attention_windows.h"
#include "quantized_gemm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Where things stand in scratch memory, for as many rows (tokens of the windows). Offsets in floats; the quantized rows
// come first, those of LayerNorm and then those of attention.
struct Layout {
  Layout(const QuantizedAttentionBlockPlan& plan, int64_t rows)
      : row_stride(ScratchStride(plan.channels)),
        qkv_stride(PanelCount(3 * plan.channels) * kPanelColumns),
        attended(QuantizedRowsFloats(rows, plan.channels)),
        qkv(attended + rows * row_stride),
        strip(qkv + rows * qkv_stride),
        attention(WholeLines(strip + rows * kPanelColumns)),
        end(attention + Maximum(ATTN_DEPLOY_FAMILY::AttentionScratch(plan.shape, plan.length),
                                NormalizeScratch(plan.channels))) {}

  int64_t row_stride;  // of attended rows
  int64_t qkv_stride;
  int64_t attended;
  int64_t qkv;
  int64_t strip;
  int64_t attention;
  int64_t end;
};

}  // namespace

AttentionBlockScratch QuantizedAttentionBlockScratchOf(const QuantizedAttentionBlockPlan& plan, int64_t windows) {
  return {Layout(plan, windows * plan.length).end, windows * plan.length};
}

void RunQuantizedAttentionBlock(const QuantizedAttentionBlockPlan& plan, const float* x, float* y, int64_t begin,
                                int64_t end, float* floats, int64_t* ints) {
  const int64_t channels = plan.channels;
  const int64_t rows = (end - begin) * plan.length;
  const int64_t* index = plan.index + begin * plan.length;
  const Layout at(plan, rows);

  TokensToRead(index, rows, ints);
  QuantizedProduct product;
  product.a = QuantizedRowsAt(floats, rows, channels);
  NormalizeAndQuantizeRows({x, channels, ints}, rows, channels, plan.epsilon, plan.norm_scale, plan.norm_bias,
                           floats + at.attention, product.a);
  product.rows = rows;
  product.weights = plan.qkv;
  product.last_panel = PanelCount(plan.qkv.out);
  Destination to;
  to.y = floats + at.qkv;
  to.stride = at.qkv_stride;
  to.columns = plan.qkv.out;
  to.has_room = true;
  MultiplyQuantizedPanels(product, to);

  float* const attended = floats + at.attended;
  AttendWindows(plan, ATTN_DEPLOY_FAMILY::AttendHead, begin, end, floats + at.qkv, at.qkv_stride, attended,
                at.row_stride, floats + at.attention);
  product.rows = DropPadding(index, rows, channels, attended, at.row_stride, ints);

  QuantizeRows({attended, at.row_stride, nullptr}, product.rows, channels, product.a);
  product.weights = plan.out;
  product.last_panel = PanelCount(plan.out.out);
  to = Destination();
  to.y = y;
  to.stride = channels;
  to.columns = channels;
  to.map = ints;
  to.residual = {x, channels, ints};
  to.strip = floats + at.strip;
  MultiplyQuantizedPanels(product, to);
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
