#include "feed_forward_operator.h"

namespace attn_deploy::native {

using namespace ort;

namespace {

constexpr FeedForwardForm kForms[] = {{"Gelu", Activation::kGelu},
                                      {"Relu", Activation::kRelu},
                                      {"Silu", Activation::kSilu},
                                      {"GeluTanh", Activation::kGeluTanh}};

}  // namespace

OrtStatus* FeedForwardKernel::CheckLayers(Layer first, Layer second) {
  channels_ = first.in;
  const Shape got = {2, {second.in, second.out}};
  const Shape expected = {2, {first.out, first.in}};
  if (got == expected) return nullptr;
  return Fail("weight2 has shape " + ToString(got) + "; expected " + ToString(expected) + ", weight1's transposed");
}

OrtStatus* FeedForwardKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const InputTensor& x = inputs[0];
  int64_t rows = 0;
  ATTN_DEPLOY_RETURN_IF_ERROR(CountRows(*this, x.shape, channels_, &rows));
  void* y = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, x.shape, &y));
  if (rows == 0) return nullptr;
  return Run(context, static_cast<const float*>(x.data), static_cast<float*>(y), rows);
}

void AppendFeedForwardForms(const OrtApi& api, const std::string& prefix, const std::vector<Operand>& inputs,
                            CpuOp::MakeKernel make, Operators* operators) {
  for (const FeedForwardForm& form : kForms) {
    operators->push_back(std::make_unique<CpuOp>(api, prefix + form.suffix, inputs, make, LikeFirstInput, &form));
  }
}

}  // namespace attn_deploy::native
