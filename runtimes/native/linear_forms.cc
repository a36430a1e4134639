#include "linear_forms.h"

#include <memory>

#include "linear_weights.h"

namespace attn_deploy::native {

using namespace ort;

namespace {

struct Named {
  const char* name;
  Activation activation;
};

constexpr Named kActivations[] = {{"", Activation::kNone},         {"Gelu", Activation::kGelu},
                                  {"Relu", Activation::kRelu},     {"Silu", Activation::kSilu},
                                  {"GeluTanh", Activation::kGeluTanh}, {"Hardswish", Activation::kHardswish}};

constexpr size_t kWeight = 1;

// x's, but for the last dim, which is the weights'.
bool InferLinear(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  const Shape& weight = inputs[kWeight];
  if (weight.rank != 2 || weight.dims[1] < 0) return false;
  *output = inputs[0];
  output->dims[output->rank - 1] = weight.dims[1];
  return true;
}

}  // namespace

LinearOp::LinearOp(const OrtApi& api_, std::string name_, std::vector<Operand> inputs_, MakeKernel make_,
                   const LinearForm& form_)
    : CpuOp(api_, std::move(name_), std::move(inputs_), make_, InferLinear), linear(form_) {}

void AppendLinearForms(const OrtApi& api, const std::string& prefix, const std::vector<Operand>& weights,
                       CpuOp::MakeKernel make, Operators* operators) {
  for (const bool has_norm : {false, true}) {
    for (const Named& activation : kActivations) {
      for (const bool has_residual : {false, true}) {
        std::vector<Operand> inputs = {{"x"}};
        inputs.insert(inputs.end(), weights.begin(), weights.end());
        if (has_norm) inputs.insert(inputs.end(), {{"norm_scale"}, {"norm_bias"}});
        if (has_residual) inputs.push_back({"residual"});
        std::string name = prefix + (has_norm ? "Norm" : "") + "Linear" + activation.name;
        if (has_residual) name += "Residual";
        operators->push_back(std::make_unique<LinearOp>(api, std::move(name), std::move(inputs), make,
                                                        LinearForm{activation.activation, has_norm, has_residual}));
      }
    }
  }
}

OrtStatus* MakeLinearOutput(const Kernel& kernel, OrtKernelContext* context, const LinearForm& form,
                            const std::vector<InputTensor>& inputs, int64_t in, int64_t out, int64_t* rows, float** y) {
  const Shape& x = inputs.front().shape;
  ATTN_DEPLOY_RETURN_IF_ERROR(CountRows(kernel, x, in, rows));
  Shape output = x;
  output.dims[output.rank - 1] = out;
  if (form.has_residual && inputs.back().shape != output) {
    return kernel.Fail("residual has shape " + ToString(inputs.back().shape) + ", x has " + ToString(x) +
                       "; expected a residual of shape " + ToString(output));
  }
  void* data = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(kernel.Api(), context, 0, output, &data));
  *y = static_cast<float*>(data);
  return nullptr;
}

}  // namespace attn_deploy::native
