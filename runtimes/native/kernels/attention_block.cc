#include "attention_block.h"

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
        attention((strip + rows * kPanelColumns + 15) / 16 * 16),
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

void AttendWindow(const AttentionBlockPlan& plan, int64_t window, const Layout& at, const float* qkv, float* attended,
                  float* scratch) {
  const int64_t head_dim = plan.shape.head_dim;
  const int64_t scores = plan.length * plan.length;
  AttentionHead head;
  head.query_stride = head.key_stride = head.value_stride = at.qkv_stride;
  head.output_stride = at.row_stride;
  head.bias_row_stride = plan.length;
  for (int64_t h = 0; h < plan.heads; ++h) {
    head.query = qkv + h * head_dim;
    head.key = head.query + plan.channels;
    head.value = head.key + plan.channels;
    head.output = attended + h * head_dim;
    head.scale = plan.head_scale == nullptr ? plan.scale : plan.scale * plan.head_scale[h];
    if (plan.bias != nullptr) head.bias = plan.bias + (plan.bias_index[window] * plan.heads + h) * scores;
    AttendHead(plan.shape, head, 0, plan.length, scratch);
  }
}

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

  // Padding is projected too, and overwritten below: windows with padding are few.
  for (int64_t r = 0; r < rows; ++r) ints[r] = Maximum(index[r], 0);
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
  for (int64_t r = 0; r < rows; ++r) {
    if (index[r] < 0) CopyRows({plan.fill, 0}, 1, 3 * channels, floats + at.qkv + r * at.qkv_stride, 0);
  }
  for (int64_t window = begin; window < end; ++window) {
    const int64_t first = (window - begin) * plan.length;
    AttendWindow(plan, window, at, floats + at.qkv + first * at.qkv_stride, attended + first * at.row_stride,
                 floats + at.attention);
  }

  // Rows that are written, moved together.
  int64_t kept = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (index[r] < 0) continue;
    if (kept != r) CopyRows({attended + r * at.row_stride, 0}, 1, channels, attended + kept * at.row_stride, 0);
    ints[kept++] = index[r];
  }
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

void RunOutsideWindows(const AttentionBlockPlan& plan, const float* x, float* y, const float* bias_out,
                       const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float* from = x + tokens[i] * plan.channels;
    float* to = y + tokens[i] * plan.channels;
    int64_t c = 0;
    for (; c + kLanes <= plan.channels; c += kLanes) Store(to + c, Load(from + c) + Load(bias_out + c));
    const int64_t rest = plan.channels - c;
    if (rest > 0) StorePartial(to + c, LoadPartial(from + c, rest) + LoadPartial(bias_out + c, rest), rest);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
