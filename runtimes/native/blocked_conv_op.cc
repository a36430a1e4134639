// Convolutions on maps in ONNX Runtime's blocked layout, with what ONNX Runtime's own cannot take into them: gates, SiLU,
// a pool. Their weights are those that ONNX Runtime has reordered.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "blocked_map.h"
#include "kernels/blocked_depthwise.h"
#include "kernels/blocked_pointwise.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct ConvForm {
  std::string name;
  Activation activation = Activation::kNone;
  bool input_gate = false;
  bool output_gate = false;
  bool residual = false;
  bool expands = false;
  bool pools = false;
};

struct ConvActivation {
  const char* suffix;
  Activation activation;
};

// Those that leave 0 as it is, so that padded channels stay 0.
constexpr ConvActivation kActivations[] = {{"", Activation::kNone},
                                           {"Relu", Activation::kRelu},
                                           {"Silu", Activation::kSilu},
                                           {"Hardswish", Activation::kHardswish},
                                           {"Gelu", Activation::kGelu}};

// Multiply-adds of a block of work: about 10 us.
constexpr int64_t kMultiplyAddsPerBlock = 512 * 1024;
constexpr int64_t kMostBlocks = 64;
// Pixels for which it pays to fetch a group's weights again.
constexpr int64_t kLeastPixels = 24;

int64_t Ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

const float* Floats(const InputTensor& tensor) { return static_cast<const float*>(tensor.data); }

class ConvKernel : public BlockedKernel {
 public:
  ConvKernel(const CpuOp& op, std::string node_name)
      : BlockedKernel(op, std::move(node_name)), form_(*static_cast<const ConvForm*>(op.form)) {}

 protected:
  // Fails where `shape` is not the expected one; -1 stands for any.
  OrtStatus* Expect(const char* name, const Shape& shape, const Shape& expected) const;
  OrtStatus* ExpectMap(const char* name, const Shape& shape) const;

  const ConvForm& form_;
};

OrtStatus* ConvKernel::Expect(const char* name, const Shape& shape, const Shape& expected) const {
  bool fits = shape.rank == expected.rank;
  for (int d = 0; fits && d < shape.rank; ++d) fits = expected.dims[d] == -1 || shape.dims[d] == expected.dims[d];
  return fits ? nullptr
              : Fail(std::string(name) + " has shape " + ToString(shape) + "; expected " + ToString(expected));
}

OrtStatus* ConvKernel::ExpectMap(const char* name, const Shape& shape) const {
  if (shape.rank == 4 && shape.dims[1] % block() == 0) return nullptr;
  return Fail(std::string(name) + " has shape " + ToString(shape) +
              "; expected [batch,channels,height,width] with channels in blocks of " + std::to_string(block()));
}

class PointwiseKernel : public ConvKernel {
 public:
  using ConvKernel::ConvKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* PointwiseKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& x = inputs[0].shape;
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectMap("x", x));
  const int64_t batch = x.dims[0];
  const int64_t out = Ceiling(channels(), block()) * block();
  ATTN_DEPLOY_RETURN_IF_ERROR(Expect("weight", inputs[1].shape, {4, {out, x.dims[1], 1, 1}}));
  ATTN_DEPLOY_RETURN_IF_ERROR(Expect("bias", inputs[2].shape, {1, {out}}));
  const Shape y_shape = {4, {batch, out, x.dims[2], x.dims[3]}};
  size_t next = 3;
  const float* input_gate = nullptr;
  const float* output_gate = nullptr;
  const float* residual = nullptr;
  if (form_.input_gate) {
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("input_gate", inputs[next].shape, {4, {batch, x.dims[1], 1, 1}}));
    input_gate = Floats(inputs[next++]);
  }
  if (form_.output_gate) {
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("output_gate", inputs[next].shape, {4, {batch, out, 1, 1}}));
    output_gate = Floats(inputs[next++]);
  }
  if (form_.residual) {
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("residual", inputs[next].shape, y_shape));
    residual = Floats(inputs[next++]);
  }
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, y_shape, &output));

  const int64_t pixels = x.dims[2] * x.dims[3];
  const int64_t in_blocks = x.dims[1] / block();
  const int64_t out_blocks = out / block();
  const int64_t group = ATTN_DEPLOY_KERNEL(PointwiseGroup)(block());
  const int64_t groups = Ceiling(out_blocks, group);
  if (batch * pixels == 0) return nullptr;
  // Groups of output blocks first; where there are not enough, pixels too.
  const int64_t wanted = std::clamp<int64_t>(x.dims[1] * out * pixels / kMultiplyAddsPerBlock, 1, kMostBlocks);
  const int64_t parts = std::clamp<int64_t>(Ceiling(wanted, groups), 1, std::max<int64_t>(pixels / kLeastPixels, 1));
  const int64_t groups_per_block = std::max<int64_t>(groups * parts / wanted, 1);
  const int64_t splits = Ceiling(groups, groups_per_block);
  const auto run = ATTN_DEPLOY_KERNEL(BlockedPointwise);
  const auto scratch_floats = ATTN_DEPLOY_KERNEL(PointwiseScratch);
  return ParallelBlocks(Api(), context, batch * splits * parts, [&](int64_t b) {
    const int64_t sample = b / (splits * parts);
    const int64_t split = b / parts % splits;
    const int64_t part = b % parts;
    const int64_t y_at = sample * out * pixels;
    const PointwiseParams params = {block(),
                                    in_blocks,
                                    out_blocks,
                                    pixels,
                                    Floats(inputs[0]) + sample * x.dims[1] * pixels,
                                    Floats(inputs[1]),
                                    Floats(inputs[2]),
                                    input_gate == nullptr ? nullptr : input_gate + sample * x.dims[1],
                                    output_gate == nullptr ? nullptr : output_gate + sample * out,
                                    residual == nullptr ? nullptr : residual + y_at,
                                    form_.activation,
                                    static_cast<float*>(output) + y_at};
    const int64_t first = split * groups_per_block * group;
    run(params, first, std::min(first + groups_per_block * group, out_blocks), pixels * part / parts,
        pixels * (part + 1) / parts, ThreadScratch().Floats(scratch_floats(params)));
  });
}

class DepthwiseKernel : public ConvKernel {
 public:
  using ConvKernel::ConvKernel;
  OrtStatus* ReadAttributes(const OrtKernelInfo* info);
  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  // Everything of `params` that one block of channels does not change; shapes are checked.
  OrtStatus* Prepare(const std::vector<InputTensor>& inputs, DepthwiseParams* params) const;
  OrtStatus* Run(OrtKernelContext* context, const std::vector<InputTensor>& inputs, const DepthwiseParams& shared,
                 float* y, float* mean) const;

  int64_t stride_ = 1;
  int64_t pads_[4] = {};  // top, left, bottom, right
};

OrtStatus* DepthwiseKernel::ReadAttributes(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(BlockedKernel::ReadAttributes(info));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "stride", &stride_));
  const char* const names[] = {"pad_top", "pad_left", "pad_bottom", "pad_right"};
  for (int i = 0; i < 4; ++i) ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, names[i], &pads_[i]));
  if (stride_ != 1 && stride_ != 2) return Fail("stride is " + std::to_string(stride_) + "; expected 1 or 2");
  for (int i = 0; i < 4; ++i) {
    if (pads_[i] < 0) return Fail(std::string(names[i]) + " is " + std::to_string(pads_[i]) + "; expected at least 0");
  }
  return nullptr;
}

OrtStatus* DepthwiseKernel::Prepare(const std::vector<InputTensor>& inputs, DepthwiseParams* params) const {
  const Shape& x = inputs[0].shape;
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectMap("x", x));
  const int64_t padded = Ceiling(channels(), block()) * block();
  const size_t at = form_.expands ? 3 : 1;
  if (form_.expands) {
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("expand_weight", inputs[1].shape, {4, {padded, x.dims[1], 1, 1}}));
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("expand_bias", inputs[2].shape, {1, {padded}}));
  } else {
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("x", x, {4, {x.dims[0], padded, x.dims[2], x.dims[3]}}));
  }
  const Shape& weight = inputs[at].shape;
  const int64_t taps = weight.rank == 4 ? weight.dims[2] : 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(Expect("weight", weight, {4, {padded, 1, taps, taps}}));
  ATTN_DEPLOY_RETURN_IF_ERROR(Expect("bias", inputs[at + 1].shape, {1, {padded}}));
  const int64_t height = x.dims[2] + pads_[0] + pads_[2] - taps;
  const int64_t width = x.dims[3] + pads_[1] + pads_[3] - taps;
  if (taps < 1 || taps > 15 || height < 0 || width < 0) {
    return Fail("weight has shape " + ToString(weight) + ", x has " + ToString(x) + "; expected a window of 1 to 15 " +
                "inside the map and its padding");
  }
  *params = {};
  params->block = block();
  params->height = x.dims[2];
  params->width = x.dims[3];
  params->out_height = height / stride_ + 1;
  params->out_width = width / stride_ + 1;
  params->taps = taps;
  params->stride = stride_;
  params->pad_top = pads_[0];
  params->pad_left = pads_[1];
  params->activation = params->expand_activation = form_.activation;
  params->in_blocks = x.dims[1] / block();
  return nullptr;
}

OrtStatus* DepthwiseKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  DepthwiseParams shared;
  ATTN_DEPLOY_RETURN_IF_ERROR(Prepare(inputs, &shared));
  const int64_t batch = inputs[0].shape.dims[0];
  const int64_t padded = Ceiling(channels(), block()) * block();
  void* y = nullptr;
  void* mean = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      MakeOutput(Api(), context, 0, {4, {batch, padded, shared.out_height, shared.out_width}}, &y));
  if (form_.pools) ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 1, {4, {batch, padded, 1, 1}}, &mean));
  return Run(context, inputs, shared, static_cast<float*>(y), static_cast<float*>(mean));
}

OrtStatus* DepthwiseKernel::Run(OrtKernelContext* context, const std::vector<InputTensor>& inputs,
                                const DepthwiseParams& shared, float* y, float* mean) const {
  const int64_t out_blocks = Ceiling(channels(), block());
  const int64_t planes = inputs[0].shape.dims[0] * out_blocks;
  const int64_t per_row = shared.out_width * block() * shared.taps * shared.taps +
                          (form_.expands ? shared.stride * shared.width * block() * shared.in_blocks * block() : 0);
  // A part makes up to taps - 1 rows that its neighbour makes too.
  const int64_t most = std::max<int64_t>(shared.out_height / (form_.expands ? 14 : 7), 1);
  const int64_t parts = std::clamp<int64_t>(per_row * shared.out_height / kMultiplyAddsPerBlock, 1, most);
  thread_local AlignedBuffer part_sums;
  float* const sums = mean == nullptr ? nullptr : part_sums.Floats(planes * parts * block());
  const int64_t x_plane = shared.height * shared.width * block();
  const int64_t y_plane = shared.out_height * shared.out_width * block();
  const auto run = ATTN_DEPLOY_KERNEL(BlockedDepthwise);
  const auto scratch_floats = ATTN_DEPLOY_KERNEL(DepthwiseScratch);
  ATTN_DEPLOY_RETURN_IF_ERROR(ParallelBlocks(Api(), context, planes * parts, [&](int64_t b) {
    const int64_t plane = b / parts;
    const int64_t channel_block = plane % out_blocks;
    const size_t at = form_.expands ? 3 : 1;
    DepthwiseParams params = shared;
    if (form_.expands) {
      params.input = Floats(inputs[0]) + plane / out_blocks * shared.in_blocks * x_plane;
      params.expand_weight = Floats(inputs[1]) + channel_block * shared.in_blocks * block() * block();
      params.expand_bias = Floats(inputs[2]) + channel_block * block();
    } else {
      params.x = Floats(inputs[0]) + plane * x_plane;
    }
    params.weight = Floats(inputs[at]) + channel_block * shared.taps * shared.taps * block();
    params.bias = Floats(inputs[at + 1]) + channel_block * block();
    params.y = y + plane * y_plane;
    run(params, shared.out_height * (b % parts) / parts, shared.out_height * (b % parts + 1) / parts,
        ThreadScratch().Floats(scratch_floats(params)), sums == nullptr ? nullptr : sums + b * block());
  }));
  if (mean == nullptr) return nullptr;
  const float scale = 1.0f / static_cast<float>(shared.out_height * shared.out_width);
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t lane = 0; lane < block(); ++lane) {
      double total = 0.0;
      for (int64_t part = 0; part < parts; ++part) total += static_cast<double>(sums[(plane * parts + part) * block() + lane]);
      mean[plane * block() + lane] = static_cast<float>(total) * scale;
    }
  }
  return nullptr;
}

bool PointwiseShape(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  if (inputs[0].rank != 4 || inputs[1].rank != 4) return false;
  *output = inputs[0];
  output->dims[1] = inputs[1].dims[0];
  return true;
}

// Strides and pads are attributes, which are not at hand.
bool UnknownShape(const std::vector<Shape>&, Shape*, int (&)[kMaxRank]) { return false; }

// Forms live as long as the library: sessions point into them.
const std::vector<ConvForm>& PointwiseForms() {
  static const auto* const forms = [] {
    auto* const made = new std::vector<ConvForm>();
    for (int bits = 0; bits < 8; ++bits) {
      for (const ConvActivation& a : kActivations) {
        ConvForm form;
        form.input_gate = bits & 1;
        form.output_gate = bits & 2;
        form.residual = bits & 4;
        form.activation = a.activation;
        form.name = std::string("BlockedPointwise") + (form.input_gate ? "InputGate" : "") +
                    (form.output_gate ? "OutputGate" : "") + (form.residual ? "Residual" : "") + a.suffix;
        made->push_back(form);
      }
    }
    return made;
  }();
  return *forms;
}

const std::vector<ConvForm>& DepthwiseForms() {
  static const auto* const forms = [] {
    auto* const made = new std::vector<ConvForm>();
    for (int bits = 0; bits < 4; ++bits) {
      for (const ConvActivation& a : kActivations) {
        ConvForm form;
        form.expands = bits & 1;
        form.pools = bits & 2;
        form.activation = a.activation;
        form.name = std::string(form.expands ? "BlockedExpandDepthwise" : "BlockedDepthwise") +
                    (form.pools ? "Pool" : "") + a.suffix;
        made->push_back(form);
      }
    }
    return made;
  }();
  return *forms;
}

}  // namespace

void AppendBlockedConv(const OrtApi& api, Operators* operators) {
  for (const ConvForm& form : PointwiseForms()) {
    std::vector<Operand> inputs = {{"x"}, {"weight"}, {"bias"}};
    if (form.input_gate) inputs.push_back({"input_gate"});
    if (form.output_gate) inputs.push_back({"output_gate"});
    if (form.residual) inputs.push_back({"residual"});
    operators->push_back(
        std::make_unique<CpuOp>(api, form.name, inputs, MakeBlocked<PointwiseKernel>, PointwiseShape, &form));
  }
  for (const ConvForm& form : DepthwiseForms()) {
    std::vector<Operand> inputs = {{"x"}};
    if (form.expands) inputs.insert(inputs.end(), {{"expand_weight"}, {"expand_bias"}});
    inputs.insert(inputs.end(), {{"weight"}, {"bias"}});
    using Infer = std::vector<CpuOp::InferShape>;
    operators->push_back(std::make_unique<CpuOp>(api, form.name, inputs, MakeBlocked<DepthwiseKernel>, UnknownShape,
                                                 &form, form.pools ? Infer{UnknownShape} : Infer{}));
  }
}

}  // namespace attn_deploy::native
