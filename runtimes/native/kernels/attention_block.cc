#include "attention_block.h"

#include "attention_windows.h"
#include "gemm.h"
#include "layer_norm.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

// Rows of the product have room for whole panels, so that no tile ends inside one.
int64_t Padded(int64_t columns) { return PanelCount(columns) * kPanelColumns; }

// Where things stand in scratch memory, for as many rows (tokens of the windows).
struct Layout {
  Layout(const AttentionBlockPlan& plan, int64_t rows)
      : row_stride(ScratchStride(plan.channels)),
        qkv_stride(Padded(3 * plan.channels)),
        attended(rows * row_stride),
        qkv(attended + rows * row_stride),
        strip(qkv + rows * qkv_stride),
        attention(WholeLines(strip + rows * kPanelColumns)),
        end(attention + AttentionScratch(plan.shape, plan.length)) {}

  int64_t row_stride;  // of normalized and attended rows
  int64_t qkv_stride;
  // Offsets in floats; the normalized rows come first.
  int64_t attended;
  int64_t qkv;
  int64_t strip;
  int64_t attention;
  int64_t end;
};

}  // namespace

AttentionBlockScratch AttentionBlockScratchOf(const AttentionBlockPlan& plan, int64_t windows) {
  return {Layout(plan, windows * plan.length).end, windows * plan.length};
}

void RunAttentionBlock(const AttentionBlockPlan& plan, const float* x, float* y, int64_t begin, int64_t end,
                       float* floats, int64_t* ints) {
  const int64_t channels = plan.channels;
  const int64_t rows = (end - begin) * plan.length;
  const int64_t* index = plan.index + begin * plan.length;
  const Layout at(plan, rows);

  TokensToRead(index, rows, ints);
  NormalizeRows({x, channels, ints}, rows, channels, plan.epsilon, floats, at.row_stride);

  Product product;
  product.a = floats;
  product.a_stride = at.row_stride;
  product.rows = rows;
  product.weights = plan.qkv;
  product.last_panel = PanelCount(plan.qkv.out);
  product.last_input = channels;
  Destination to;
  to.y = floats + at.qkv;
  to.stride = at.qkv_stride;
  to.columns = plan.qkv.out;
  to.has_room = true;
  MultiplyPanels(product, to);

  float* const attended = floats + at.attended;
  AttendWindows(plan, AttendHead, begin, end, floats + at.qkv, at.qkv_stride, attended, at.row_stride,
                floats + at.attention);
  const int64_t kept = DropPadding(index, rows, channels, attended, at.row_stride, ints);

  product.a = attended;
  product.rows = kept;
  product.weights = plan.out;
  product.last_panel = PanelCount(plan.out.out);
  to = Destination();
  to.y = y;
  to.stride = channels;
  to.columns = channels;
  to.map = ints;
  to.residual = {x, channels, ints};
  to.strip = floats + at.strip;
  MultiplyPanels(product, to);
}

void RunOutsideWindows(const WindowAttention& attention, const float* x, float* y, const float* bias_out,
                       const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = x + tokens[i] * attention.channels;
    float* to = y + tokens[i] * attention.channels;
    ForVectors(attention.channels, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
      if (lanes == kLanes) Store(to + c, Load(from + c) + Load(bias_out + c));
      if (lanes < kLanes) {
        StorePartial(to + c, LoadPartial(from + c, lanes) + LoadPartial(bias_out + c, lanes), lanes);
      }
    });
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
