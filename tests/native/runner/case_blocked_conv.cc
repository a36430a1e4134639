// Cases of the convolutions on the blocked layout.
#include "case.h"
#include "kernels/blocked_depthwise.h"
#include "kernels/blocked_pointwise.h"

namespace attn_deploy::native::runner {
namespace {

// ints {activation, has input gate, has output gate, has residual, pixels per call}, inputs {x [in blocks, pixels,
// block], weight [out blocks, in blocks, block, block], bias [out blocks, block], then the operands that there are}.
std::vector<Array> RunPointwiseCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  const Array& weight = c.inputs.at(1);
  PointwiseParams p = {};
  p.block = x.dims.at(2);
  p.in_blocks = x.dims.at(0);
  p.pixels = x.dims.at(1);
  p.out_blocks = weight.dims.at(0);
  p.x = x.floats();
  p.weight = weight.floats();
  p.bias = c.inputs.at(2).floats();
  size_t next = 3;
  if (c.ints.at(1) != 0) p.input_gate = c.inputs.at(next++).floats();
  if (c.ints.at(2) != 0) p.output_gate = c.inputs.at(next++).floats();
  if (c.ints.at(3) != 0) p.residual = c.inputs.at(next++).floats();
  p.activation = static_cast<Activation>(c.ints.at(0));
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{p.out_blocks, p.pixels, p.block}, 1);
  p.y = outputs[0].floats();
  const Array scratch(Type::kFloat, {ATTN_DEPLOY_KERNEL(PointwiseScratch)(p)}, 0);
  const int64_t group = ATTN_DEPLOY_KERNEL(PointwiseGroup)(p.block);
  for (int64_t block = 0; block < p.out_blocks; block += group) {
    const int64_t last_block = block + group < p.out_blocks ? block + group : p.out_blocks;
    for (int64_t pixel = 0; pixel < p.pixels; pixel += c.ints.at(4)) {
      const int64_t last = pixel + c.ints[4] < p.pixels ? pixel + c.ints[4] : p.pixels;
      ATTN_DEPLOY_KERNEL(BlockedPointwise)(p, block, last_block, pixel, last, scratch.floats());
    }
  }
  return outputs;
}

// ints {activation, stride, pad top, pad left, out height, out width, rows per call}, inputs {x [height, width, block],
// weight [taps, taps, block], bias [block]}, or in place of x {input [in blocks, height, width, block], expand weight
// [in blocks, block, block], expand bias [block]}. Outputs {y, sums of the calls [calls, block]}.
std::vector<Array> RunDepthwiseCase(const Case& c) {
  const bool expands = c.inputs.size() == 5;
  const Array& x = c.inputs.at(0);
  const size_t at = expands ? 3 : 1;
  const Array& weight = c.inputs.at(at);
  DepthwiseParams p = {};
  p.block = weight.dims.at(2);
  p.height = x.dims.at(expands ? 1 : 0);
  p.width = x.dims.at(expands ? 2 : 1);
  p.taps = weight.dims.at(0);
  p.stride = c.ints.at(1);
  p.pad_top = c.ints.at(2);
  p.pad_left = c.ints.at(3);
  p.out_height = c.ints.at(4);
  p.out_width = c.ints.at(5);
  p.weight = weight.floats();
  p.bias = c.inputs.at(at + 1).floats();
  p.activation = p.expand_activation = static_cast<Activation>(c.ints.at(0));
  if (expands) {
    p.in_blocks = x.dims.at(0);
    p.input = x.floats();
    p.expand_weight = c.inputs[1].floats();
    p.expand_bias = c.inputs[2].floats();
  } else {
    p.x = x.floats();
  }
  const int64_t rows = c.ints.at(6);
  const int64_t calls = (p.out_height + rows - 1) / rows;
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{p.out_height, p.out_width, p.block}, 1);
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{calls, p.block}, 1);
  p.y = outputs[0].floats();
  const Array scratch(Type::kFloat, {ATTN_DEPLOY_KERNEL(DepthwiseScratch)(p)}, 0);
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t last = (call + 1) * rows < p.out_height ? (call + 1) * rows : p.out_height;
    ATTN_DEPLOY_KERNEL(BlockedDepthwise)
    (p, call * rows, last, scratch.floats(), outputs[1].floats() + call * p.block);
  }
  return outputs;
}

const Registered kPointwise("blocked_pointwise", RunPointwiseCase);
const Registered kDepthwise("blocked_depthwise", RunDepthwiseCase);

}  // namespace
}  // namespace attn_deploy::native::runner
