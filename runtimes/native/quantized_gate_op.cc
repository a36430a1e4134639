// QuantizedGate and QuantizedChannelPool: gates and their pools on 8-bit maps [batch, height, width, channels].
#include "kernels/quantized_gate.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "operators.h"
#include "quantized_map.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct GateForm {
  Activation activation;
  bool residual;
};

struct GateOp : CpuOp {
  GateOp(const OrtApi& api_, std::string name_, std::vector<Operand> inputs_, MakeKernel make_, GateForm form_)
      : CpuOp(api_, std::move(name_), std::move(inputs_), make_, LikeFirstInput), gate(form_) {
    output_type = ElementType::kUint8;
  }
  const GateForm gate;
};

// Inputs, as attn_deploy/ops/quantized_gate.py has them.
enum : size_t { kX, kGate, kXScale, kXZero, kYScale, kYZero, kResidual, kResidualScale };

// Elements of a block of work: about 5 us.
constexpr int64_t kElementsPerBlock = 65536;
// Channels of a block of a pool: a cache line.
constexpr int64_t kPoolChannels = 64;

class GateKernel : public Kernel {
 public:
  GateKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(static_cast<const GateOp&>(op).gate) {}

  OrtStatus* Init(const OrtKernelInfo* info);
  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  const GateForm& form_;
  int64_t channels_ = 0;
  Levels x_, y_, residual_;
  std::vector<float> inverse_;
};

OrtStatus* GateKernel::Init(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "channels", &channels_));
  if (channels_ < 1) return Fail("channels is " + std::to_string(channels_) + "; expected at least 1");
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kXScale, channels_, &x_));
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kYScale, channels_, &y_));
  if (form_.residual) ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kResidualScale, channels_, &residual_));
  inverse_.resize(y_.scale.size());
  for (size_t c = 0; c < inverse_.size(); ++c) inverse_[c] = 1.0f / y_.scale[c];
  return nullptr;
}

OrtStatus* GateKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& shape = inputs[kX].shape;
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "x", shape, {4, {-1, -1, -1, channels_}}));
  const int64_t batch = shape.dims[0];
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "gate", inputs[kGate].shape, {4, {batch, channels_, 1, 1}}));
  if (form_.residual) ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "residual", inputs[kResidual].shape, shape));
  void* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, shape, &y));
  const int64_t pixels = shape.dims[1] * shape.dims[2];
  if (pixels == 0) return nullptr;
  const int64_t parts = std::clamp<int64_t>(pixels * channels_ / kElementsPerBlock, 1, std::max<int64_t>(pixels / 8, 1));
  const auto run = ATTN_DEPLOY_INT8_KERNEL(RunQuantizedGate);
  const int64_t scratch = ATTN_DEPLOY_INT8_KERNEL(QuantizedGateScratch)(channels_);
  return ParallelBlocks(Api(), context, batch * parts, [&](int64_t block) {
    const int64_t sample = block / parts;
    const int64_t part = block % parts;
    const int64_t at = sample * pixels * channels_;
    QuantizedGateArrays arrays;
    arrays.x = static_cast<const uint8_t*>(inputs[kX].data) + at;
    arrays.x_scale = x_.scale.data();
    arrays.x_zero = x_.zero;
    arrays.gate = static_cast<const float*>(inputs[kGate].data) + sample * channels_;
    if (form_.residual) {
      arrays.residual = static_cast<const uint8_t*>(inputs[kResidual].data) + at;
      arrays.residual_scale = residual_.scale.data();
      arrays.residual_zero = residual_.zero;
    }
    arrays.y = static_cast<uint8_t*>(y) + at;
    arrays.inverse = inverse_.data();
    arrays.y_zero = y_.zero;
    arrays.channels = channels_;
    run(arrays, form_.activation, pixels * part / parts, pixels * (part + 1) / parts, ThreadScratch().Floats(scratch));
  });
}

class PoolKernel : public Kernel {
 public:
  using Kernel::Kernel;

  OrtStatus* Init(const OrtKernelInfo* info) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "channels", &channels_));
    if (channels_ < 1) return Fail("channels is " + std::to_string(channels_) + "; expected at least 1");
    return ReadLevels(*this, info, 1, channels_, &x_);
  }

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  int64_t channels_ = 0;
  Levels x_;
};

OrtStatus* PoolKernel::Compute(OrtKernelContext* context) const {
  InputTensor x;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, 0, &x));
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "x", x.shape, {4, {-1, -1, -1, channels_}}));
  const int64_t batch = x.shape.dims[0];
  const int64_t pixels = x.shape.dims[1] * x.shape.dims[2];
  void* mean = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, {4, {batch, channels_, 1, 1}}, &mean));
  const auto run = ATTN_DEPLOY_INT8_KERNEL(RunQuantizedPool);
  const int64_t lines = (channels_ + kPoolChannels - 1) / kPoolChannels;
  const int64_t parts = std::clamp<int64_t>(pixels * channels_ / kElementsPerBlock, 1, lines);
  return ParallelBlocks(Api(), context, batch * parts, [&](int64_t block) {
    const int64_t sample = block / parts;
    const int64_t part = block % parts;
    run(static_cast<const uint8_t*>(x.data) + sample * pixels * channels_, pixels, channels_, x_.scale.data(), x_.zero,
        lines * part / parts * kPoolChannels, std::min(lines * (part + 1) / parts * kPoolChannels, channels_),
        static_cast<float*>(mean) + sample * channels_);
  });
}

template <typename Made>
OrtStatus* Make(const CpuOp& op, const OrtKernelInfo* info, std::string node_name, std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<Made>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

// [batch, height, width, channels] -> [batch, channels, 1, 1]
bool InferPool(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  if (inputs[0].rank != 4 || inputs[0].dims[3] < 0) return false;
  *output = {4, {inputs[0].dims[0], inputs[0].dims[3], 1, 1}};
  return true;
}

struct Named {
  const char* name;
  Activation activation;
};

constexpr Named kActivations[] = {{"", Activation::kNone}, {"Relu", Activation::kRelu}, {"Silu", Activation::kSilu}};

}  // namespace

void AppendQuantizedGate(const OrtApi& api, Operators* operators) {
  const auto byte = ElementType::kUint8;
  for (const bool residual : {false, true}) {
    for (const Named& activation : kActivations) {
      std::vector<Operand> inputs = {{"x", byte},   {"gate"},    {"x_scale"},
                                     {"x_zero", byte}, {"y_scale"}, {"y_zero", byte}};
      if (residual) {
        inputs.insert(inputs.end(), {{"residual", byte}, {"residual_scale"}, {"residual_zero", byte}});
      }
      std::string name = std::string("QuantizedGate") + (residual ? "Residual" : "") + activation.name;
      operators->push_back(std::make_unique<GateOp>(api, std::move(name), std::move(inputs), Make<GateKernel>,
                                                    GateForm{activation.activation, residual}));
    }
  }
  const std::vector<Operand> pool = {{"x", byte}, {"x_scale"}, {"x_zero", byte}};
  operators->push_back(std::make_unique<CpuOp>(api, "QuantizedChannelPool", pool, Make<PoolKernel>, InferPool));
}

}  // namespace attn_deploy::native
