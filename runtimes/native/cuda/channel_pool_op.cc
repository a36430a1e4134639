// The ChannelPool kernel as operators of ONNX Runtime, as attn_deploy/ops/channel_pool.py has them.
#include <string>
#include <utility>

#include "channel_pool.h"
#include "operator.h"

namespace attn_deploy::cuda {
namespace {

using namespace ort;
using native::InputTensor;
using native::kMaxRank;
using native::Shape;

struct ChannelPoolOp : CudaOp {
  ChannelPoolOp(const OrtApi& api, std::string name, bool mean_, bool maximum_, Element element);

  const bool mean;
  const bool maximum;
};

struct ChannelPoolKernel : Kernel {
  using Kernel::Kernel;

  OrtStatus* Compute(OrtKernelContext* context) const override {
    std::vector<InputTensor> inputs;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
    const Shape& x = inputs[0].shape;
    if (x.rank != 4 || x.dims[2] * x.dims[3] == 0) {
      return Fail("x has shape " + ToString(x) + "; expected [batch, channels, height, width] with pixels");
    }
    const auto& pool = static_cast<const ChannelPoolOp&>(op);
    ChannelPoolArguments arguments;
    arguments.x = inputs[0].data;
    arguments.planes = x.dims[0] * x.dims[1];
    arguments.pixels = x.dims[2] * x.dims[3];
    Shape pooled = x;
    pooled.dims[2] = pooled.dims[3] = 1;
    size_t output = 0;
    if (pool.mean) {
      ATTN_DEPLOY_RETURN_IF_ERROR(native::MakeOutput(Api(), context, output++, pooled, &arguments.mean));
    }
    if (pool.maximum) {
      ATTN_DEPLOY_RETURN_IF_ERROR(native::MakeOutput(Api(), context, output++, pooled, &arguments.maximum));
    }
    cudaStream_t stream = nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(GetStream(Api(), context, &stream));
    return CheckCuda(LaunchChannelPool(arguments, op.element, device, stream), "the kernel did not start");
  }
};

OrtStatus* Create(const CudaOp& op, const OrtKernelInfo*, std::string node_name, const Device& device,
                  std::unique_ptr<Kernel>* kernel) {
  *kernel = std::make_unique<ChannelPoolKernel>(op, std::move(node_name), device);
  return nullptr;
}

bool Infer(const Shape& first, Shape* output, int (&from)[kMaxRank]) {
  if (first.rank != 4) return false;
  *output = first;
  output->dims[2] = output->dims[3] = 1;
  for (int d = 0; d < kMaxRank; ++d) from[d] = d;
  return true;
}

ChannelPoolOp::ChannelPoolOp(const OrtApi& api_, std::string name_, bool mean_, bool maximum_, Element element_)
    : CudaOp(api_, std::move(name_), {{"x"}}, size_t{mean_} + size_t{maximum_}, element_, Create, Infer),
      mean(mean_),
      maximum(maximum_) {}

}  // namespace

void AppendChannelPool(const OrtApi& api, Element element, Operators* operators) {
  operators->push_back(std::make_unique<ChannelPoolOp>(api, "ChannelPoolMean", true, false, element));
  operators->push_back(std::make_unique<ChannelPoolOp>(api, "ChannelPoolMax", false, true, element));
  operators->push_back(std::make_unique<ChannelPoolOp>(api, "ChannelPoolMeanMax", true, true, element));
}

}  // namespace attn_deploy::cuda
