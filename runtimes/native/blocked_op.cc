// Gates, activations and pools on maps in ONNX Runtime's blocked layout.
#include <algorithm>

#include "blocked_map.h"
#include "kernels/blocked_gate.h"
#include "kernels/blocked_pool.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

struct BlockedForm {
  const char* name;
  Activation activation;
  bool has_residual = false;
};

constexpr BlockedForm kGates[] = {
    {"BlockedGate", Activation::kNone},
    {"BlockedGateRelu", Activation::kRelu},
    {"BlockedGateSilu", Activation::kSilu},
    {"BlockedGateHardswish", Activation::kHardswish},
    {"BlockedGateResidual", Activation::kNone, true},
    {"BlockedGateResidualRelu", Activation::kRelu, true},
    {"BlockedGateResidualSilu", Activation::kSilu, true},
    {"BlockedGateResidualHardswish", Activation::kHardswish, true},
};

constexpr BlockedForm kActivations[] = {
    {"BlockedActivateRelu", Activation::kRelu},           {"BlockedActivateSilu", Activation::kSilu},
    {"BlockedActivateHardswish", Activation::kHardswish}, {"BlockedActivateGelu", Activation::kGelu},
    {"BlockedActivateGeluTanh", Activation::kGeluTanh},   {"BlockedActivateSigmoid", Activation::kSigmoid},
    {"BlockedActivateHardSigmoid", Activation::kHardSigmoid},
};

// Elements of a block of work. A thread takes about 5 us to wake.
constexpr int64_t ElementsPerBlock(Activation activation) {
  const bool has_exp = activation != Activation::kNone && activation != Activation::kRelu &&
                       activation != Activation::kHardswish && activation != Activation::kHardSigmoid;
  return has_exp ? 8192 : 16384;
}

class BlockedFormKernel : public BlockedKernel {
 public:
  BlockedFormKernel(const CpuOp& op, std::string node_name)
      : BlockedKernel(op, std::move(node_name)), form_(*static_cast<const BlockedForm*>(op.form)) {}

 protected:
  const BlockedForm& form_;
};

class GateKernel : public BlockedFormKernel {
 public:
  using BlockedFormKernel::BlockedFormKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* GateKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& x = inputs[0].shape;
  const Shape& gate = inputs[1].shape;
  BlockedMap map;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("x", x, &map));
  const bool fits = gate.rank == 4 && (gate.dims[0] == x.dims[0] || gate.dims[0] == 1);
  const bool per_channel = fits && gate.dims[1] == x.dims[1] && gate.dims[2] == 1 && gate.dims[3] == 1;
  const bool per_pixel = fits && gate.dims[1] == 1 && gate.dims[2] == x.dims[2] && gate.dims[3] == x.dims[3];
  if (!per_channel && !per_pixel) {
    return Fail("gate has shape " + ToString(gate) + ", x has " + ToString(x) +
                "; expected [batch or 1,channels,1,1] or [batch or 1,1,height,width]");
  }
  if (form_.has_residual && inputs[2].shape != x) {
    return Fail("residual has shape " + ToString(inputs[2].shape) + ", x has " + ToString(x));
  }
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, x, &output));
  const auto* residual = form_.has_residual ? static_cast<const float*>(inputs[2].data) : nullptr;
  const auto run = ATTN_DEPLOY_KERNEL(BlockedGate);
  const int64_t planes_per_sample = map.padded / map.block;
  const int64_t gate_stride = gate.dims[0] == 1 ? 0 : (per_pixel ? map.pixels : map.padded);
  const BlockedPieces pieces(map, ElementsPerBlock(form_.activation));
  return ParallelPieces(Api(), context, map, pieces, [&](int64_t plane, int64_t, int64_t first, int64_t pixels) {
    const int64_t at = (plane * map.pixels + first) * map.block;
    const int64_t gate_at = plane / planes_per_sample * gate_stride +
                            (per_pixel ? first : plane % planes_per_sample * map.block);
    run(form_.activation, per_pixel, map.block, pixels,
        {static_cast<const float*>(inputs[0].data) + at, static_cast<const float*>(inputs[1].data) + gate_at,
         residual == nullptr ? nullptr : residual + at, static_cast<float*>(output) + at});
  });
}

class ActivateKernel : public BlockedFormKernel {
 public:
  using BlockedFormKernel::BlockedFormKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* ActivateKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  BlockedMap map;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("x", inputs[0].shape, &map));
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, inputs[0].shape, &output));
  const auto run = ATTN_DEPLOY_KERNEL(BlockedActivate);
  const int64_t planes_per_sample = map.padded / map.block;
  const BlockedPieces pieces(map, ElementsPerBlock(form_.activation));
  return ParallelPieces(Api(), context, map, pieces, [&](int64_t plane, int64_t, int64_t first, int64_t pixels) {
    const int64_t at = (plane * map.pixels + first) * map.block;
    const int64_t valid = std::min(channels() - plane % planes_per_sample * map.block, map.block);
    run(form_.activation, map.block, valid, pixels, static_cast<const float*>(inputs[0].data) + at,
        static_cast<float*>(output) + at);
  });
}

class PoolKernel : public BlockedKernel {
 public:
  using BlockedKernel::BlockedKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* PoolKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  BlockedMap map;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("x", inputs[0].shape, &map));
  if (map.pixels == 0) return Fail("x has shape " + ToString(inputs[0].shape) + "; expected pixels");
  void* mean = nullptr;
  const Shape pooled = {4, {map.batch, map.padded, 1, 1}};
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, pooled, &mean));

  const auto sum = ATTN_DEPLOY_KERNEL(BlockedSum);
  const auto finish = ATTN_DEPLOY_KERNEL(BlockedMean);
  const BlockedPieces pieces(map, ElementsPerBlock(Activation::kNone));
  float* const sums = ThreadScratch().Floats(map.planes() * pieces.parts * map.block);
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ParallelPieces(Api(), context, map, pieces, [&](int64_t plane, int64_t part, int64_t first, int64_t pixels) {
        sum(map.block, pixels, static_cast<const float*>(inputs[0].data) + (plane * map.pixels + first) * map.block,
            sums + (plane * pieces.parts + part) * map.block);
      }));
  for (int64_t plane = 0; plane < map.planes(); ++plane) {
    finish(map.block, pieces.parts, map.pixels, sums + plane * pieces.parts * map.block,
           static_cast<float*>(mean) + plane * map.block);
  }
  return nullptr;
}

}  // namespace

void AppendBlocked(const OrtApi& api, Operators* operators) {
  for (const BlockedForm& form : kGates) {
    std::vector<Operand> inputs = {{"x"}, {"gate"}};
    if (form.has_residual) inputs.push_back({"residual"});
    operators->push_back(
        std::make_unique<CpuOp>(api, form.name, inputs, MakeBlocked<GateKernel>, LikeFirstInput, &form));
  }
  for (const BlockedForm& form : kActivations) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, std::vector<Operand>{{"x"}},
                                                 MakeBlocked<ActivateKernel>, LikeFirstInput, &form));
  }
  operators->push_back(std::make_unique<CpuOp>(api, "BlockedPool", std::vector<Operand>{{"x"}},
                                               MakeBlocked<PoolKernel>, LikePooledFirstInput));
}

}  // namespace attn_deploy::native
