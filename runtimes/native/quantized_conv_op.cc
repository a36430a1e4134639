// QuantizedConv and QuantizedDepthwise: 8-bit maps in, 8-bit maps out, with all scales known when the model is loaded.
#include "kernels/quantized_conv.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels/quantized_depthwise.h"
#include "operators.h"
#include "quantized_map.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct ConvForm {
  Activation activation;
  bool depthwise;
  bool residual;
  int64_t stride;
};

struct ConvOp : CpuOp {
  ConvOp(const OrtApi& api_, std::string name_, std::vector<Operand> inputs_, MakeKernel make_, ConvForm form_)
      : CpuOp(api_, std::move(name_), std::move(inputs_), make_, nullptr), conv(form_) {
    output_type = ElementType::kUint8;
  }
  const ConvForm conv;
};

// Inputs, as attn_deploy/ops/quantized_conv.py has them.
enum : size_t { kX, kWeight, kWeightScale, kBias, kXScale, kXZero, kYScale, kYZero, kResidual, kResidualScale };

class ConvKernel : public Kernel {
 public:
  ConvKernel(const CpuOp& op, std::string node_name)
      : Kernel(op, std::move(node_name)), form_(static_cast<const ConvOp&>(op).conv) {}

  OrtStatus* Init(const OrtKernelInfo* info);
  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  OrtStatus* Pack(const OrtKernelInfo* info, const InputTensor& weight);

  const ConvForm& form_;
  QuantizedConvPlan shared_;  // what does not depend on the size of the map
  int64_t pad_bottom_ = 0;
  int64_t pad_right_ = 0;
  AlignedBuffer memory_;
  const float* weights_ = nullptr;  // packed, in memory_
};

OrtStatus* ConvKernel::Init(const OrtKernelInfo* info) {
  QuantizedConvPlan& p = shared_;
  p.stride = form_.stride;
  p.activation = form_.activation;
  p.has_residual = form_.residual;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "pad_top", &p.pad_top));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "pad_left", &p.pad_left));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "pad_bottom", &pad_bottom_));
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "pad_right", &pad_right_));
  if (std::min({p.pad_top, p.pad_left, pad_bottom_, pad_right_}) < 0) return Fail("a padding is below 0");
  InputTensor weight;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ReadTyped(*this, info, kWeight, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {4, {-1, -1, -1, -1}}, &weight));
  const int64_t* dims = weight.shape.dims;
  p.out = dims[0];
  p.kernel_height = dims[1];
  p.kernel_width = dims[2];
  p.in = form_.depthwise ? p.out : dims[3];
  const bool fits = std::min({dims[0], dims[1], dims[2], dims[3]}) >= 1 && dims[1] * dims[2] * dims[3] <= 65536 &&
                    (!form_.depthwise || (dims[3] == 1 && dims[1] == dims[2] && dims[1] <= kMostDepthwiseTaps));
  if (!fits) return Fail("weight has shape " + ToString(weight.shape) + ", which there is no kernel for");
  return Pack(info, weight);
}

OrtStatus* ConvKernel::Pack(const OrtKernelInfo* info, const InputTensor& weight) {
  QuantizedConvPlan& p = shared_;
  InputTensor weight_scale, bias;
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ReadTyped(*this, info, kWeightScale, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {1, {p.out}}, &weight_scale));
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadTyped(*this, info, kBias, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {1, {p.out}}, &bias));
  Levels x, y, residual;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kXScale, form_.depthwise ? p.out : 1, &x));
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kYScale, p.out, &y));
  if (form_.residual) ATTN_DEPLOY_RETURN_IF_ERROR(ReadLevels(*this, info, kResidualScale, p.out, &residual));
  p.x_zero = x.zero;
  p.y_zero = y.zero;
  const bool piecewise = form_.activation == Activation::kNone || form_.activation == Activation::kRelu;
  const auto count = static_cast<size_t>(p.out);
  std::vector<float> multiplier(count), biases(count), residuals(count), inverse(count);
  for (size_t c = 0; c < count; ++c) {
    const double unit = piecewise ? 1.0 / static_cast<double>(y.scale[c]) : 1.0;
    const double x_scale = x.scale[form_.depthwise ? c : 0];
    multiplier[c] = static_cast<float>(x_scale * static_cast<const float*>(weight_scale.data)[c] * unit);
    double sum = static_cast<double>(static_cast<const float*>(bias.data)[c]) * unit + (piecewise ? y.zero : 0);
    if (form_.residual) {
      residuals[c] = static_cast<float>(static_cast<double>(residual.scale[c]) * unit);
      sum -= static_cast<double>(residual.scale[c]) * unit * residual.zero;
    }
    biases[c] = static_cast<float>(sum);
    inverse[c] = static_cast<float>(1.0 / static_cast<double>(y.scale[c]));
  }
  const Requantization requantization = {multiplier.data(), biases.data(), residuals.data(), inverse.data()};
  const auto* const weights = static_cast<const uint8_t*>(weight.data);
  if (form_.depthwise) {
    float* const to = memory_.Floats(ATTN_DEPLOY_INT8_KERNEL(QuantizedDepthwiseSize)(p.kernel_height, p.out));
    ATTN_DEPLOY_INT8_KERNEL(PackQuantizedDepthwise)(weights, requantization, p.kernel_height, p.out, to);
    weights_ = to;
    return nullptr;
  }
  const int64_t depth = p.kernel_height * p.kernel_width * p.in;
  float* const to = memory_.Floats((ATTN_DEPLOY_INT8_KERNEL(QuantizedConvSize)(depth, p.out) + 3) / 4);
  ATTN_DEPLOY_INT8_KERNEL(PackQuantizedConv)(weights, requantization, p.x_zero, depth, p.out, to);
  weights_ = to;
  return nullptr;
}

OrtStatus* ConvKernel::Compute(OrtKernelContext* context) const {
  InputTensor x, residual;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, kX, &x));
  QuantizedConvPlan plan = shared_;
  ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "x", x.shape, {4, {-1, -1, -1, plan.in}}));
  const int64_t batch = x.shape.dims[0];
  plan.height = x.shape.dims[1];
  plan.width = x.shape.dims[2];
  const int64_t down = plan.height + plan.pad_top + pad_bottom_ - plan.kernel_height;
  const int64_t across = plan.width + plan.pad_left + pad_right_ - plan.kernel_width;
  if (down < 0 || across < 0 || plan.height < 1 || plan.width < 1) {
    return Fail("x has shape " + ToString(x.shape) + "; expected a map that, with its padding, holds the window");
  }
  plan.out_height = down / plan.stride + 1;
  plan.out_width = across / plan.stride + 1;
  const Shape shape = {4, {batch, plan.out_height, plan.out_width, plan.out}};
  if (form_.residual) {
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInput(Api(), context, kResidual, &residual));
    ATTN_DEPLOY_RETURN_IF_ERROR(ExpectShape(*this, "residual", residual.shape, shape));
  }
  void* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, shape, &y));

  const auto run = form_.depthwise ? ATTN_DEPLOY_INT8_KERNEL(RunQuantizedDepthwise)
                                   : ATTN_DEPLOY_INT8_KERNEL(RunQuantizedConv);
  (form_.depthwise ? ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedDepthwise) : ATTN_DEPLOY_INT8_KERNEL(PlanQuantizedConv))(
      &plan);
  const int64_t x_size = plan.height * plan.width * plan.in;
  const int64_t y_size = plan.out_height * plan.out_width * plan.out;
  return ParallelBlocks(Api(), context, batch * plan.blocks(), [&](int64_t block) {
    const int64_t sample = block / plan.blocks();
    const QuantizedConvArrays arrays = {
        static_cast<const uint8_t*>(x.data) + sample * x_size, weights_,
        form_.residual ? static_cast<const uint8_t*>(residual.data) + sample * y_size : nullptr,
        static_cast<uint8_t*>(y) + sample * y_size};
    run(plan, arrays, block % plan.blocks(), ThreadScratch().Floats(plan.scratch));
  });
}

OrtStatus* MakeConv(const CpuOp& op, const OrtKernelInfo* info, std::string node_name,
                    std::unique_ptr<Kernel>* kernel) {
  auto made = std::make_unique<ConvKernel>(op, std::move(node_name));
  ATTN_DEPLOY_RETURN_IF_ERROR(made->Init(info));
  *kernel = std::move(made);
  return nullptr;
}

struct Named {
  const char* name;
  Activation activation;
};

constexpr Named kActivations[] = {{"", Activation::kNone},
                                  {"Relu", Activation::kRelu},
                                  {"Silu", Activation::kSilu},
                                  {"Hardswish", Activation::kHardswish}};

}  // namespace

void AppendQuantizedConv(const OrtApi& api, Operators* operators) {
  for (const bool depthwise : {false, true}) {
    for (const int64_t stride : {1, 2}) {
      for (const bool residual : {false, true}) {
        if (residual && stride != 1) continue;
        for (const Named& activation : kActivations) {
          std::vector<Operand> inputs = {{"x", ElementType::kUint8},      {"weight", ElementType::kUint8},
                                         {"weight_scale"},                {"bias"},
                                         {"x_scale"},                     {"x_zero", ElementType::kUint8},
                                         {"y_scale"},                     {"y_zero", ElementType::kUint8}};
          if (residual) {
            inputs.insert(inputs.end(), {{"residual", ElementType::kUint8},
                                         {"residual_scale"},
                                         {"residual_zero", ElementType::kUint8}});
          }
          std::string name = std::string(depthwise ? "QuantizedDepthwise" : "QuantizedConv") +
                             (stride == 2 ? "Stride2" : "") + (residual ? "Residual" : "") + activation.name;
          operators->push_back(std::make_unique<ConvOp>(api, std::move(name), std::move(inputs), MakeConv,
                                                        ConvForm{activation.activation, depthwise, residual, stride}));
        }
      }
    }
  }
}

}  // namespace attn_deploy::native
