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
  bool second = false;  // the second input or output: a gate's residual, a pool's map
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

constexpr BlockedForm kPools[] = {
    {"BlockedPool", Activation::kNone},
    {"BlockedPoolRelu", Activation::kRelu},
    {"BlockedPoolSilu", Activation::kSilu},
    {"BlockedPoolHardswish", Activation::kHardswish},
    {"BlockedActivatePoolRelu", Activation::kRelu, true},
    {"BlockedActivatePoolSilu", Activation::kSilu, true},
    {"BlockedActivatePoolHardswish", Activation::kHardswish, true},
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
  if (form_.second && inputs[2].shape != x) {
    return Fail("residual has shape " + ToString(inputs[2].shape) + ", x has " + ToString(x));
  }
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, x, &output));
  const auto* residual = form_.second ? static_cast<const float*>(inputs[2].data) : nullptr;
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

class PoolKernel : public BlockedFormKernel {
 public:
  using BlockedFormKernel::BlockedFormKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;
};

OrtStatus* PoolKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  BlockedMap map;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("x", inputs[0].shape, &map));
  if (map.pixels == 0) return Fail("x has shape " + ToString(inputs[0].shape) + "; expected pixels");
  size_t outputs = 0;
  void* map_output = nullptr;
  if (form_.second) ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, outputs++, inputs[0].shape, &map_output));
  void* mean = nullptr;
  const Shape pooled = {4, {map.batch, map.padded, 1, 1}};
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, outputs, pooled, &mean));

  const auto sum = ATTN_DEPLOY_KERNEL(BlockedSum);
  const auto finish = ATTN_DEPLOY_KERNEL(BlockedMean);
  const BlockedPieces pieces(map, ElementsPerBlock(form_.activation));
  float* const sums = ThreadScratch().Floats(map.planes() * pieces.parts * map.block);
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ParallelPieces(Api(), context, map, pieces, [&](int64_t plane, int64_t part, int64_t first, int64_t pixels) {
        const int64_t at = (plane * map.pixels + first) * map.block;
        sum(form_.activation, map.block, pixels, static_cast<const float*>(inputs[0].data) + at,
            map_output == nullptr ? nullptr : static_cast<float*>(map_output) + at,
            sums + (plane * pieces.parts + part) * map.block);
      }));
  for (int64_t plane = 0; plane < map.planes(); ++plane) {
    finish(map.block, pieces.parts, map.pixels, sums + plane * pieces.parts * map.block,
           static_cast<float*>(mean) + plane * map.block);
  }
  return nullptr;
}

// The weights of a blocked convolution times a gate per input channel (of a convolution of one group, OIHWBiBo), or per
// output channel and its bias too (any): instead of a pass over the map before or behind it.
class ScaleKernel : public BlockedFormKernel {
 public:
  using BlockedFormKernel::BlockedFormKernel;
  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  OrtStatus* ScaleInput(OrtKernelContext* context, const std::vector<InputTensor>& inputs) const;
  OrtStatus* ScaleOutput(OrtKernelContext* context, const std::vector<InputTensor>& inputs) const;
};

constexpr BlockedForm kScales[] = {
    {"BlockedScaleInput", Activation::kNone},
    {"BlockedScaleOutput", Activation::kNone, true},
};

OrtStatus* ScaleKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  BlockedMap gate;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadMap("gate", inputs.back().shape, &gate));
  const Shape& weight = inputs[0].shape;
  if (gate.batch != 1 || gate.pixels != 1) {
    return Fail("gate has shape " + ToString(inputs.back().shape) + "; expected batch 1 and one pixel");
  }
  if (weight.rank != 4 || weight.dims[0] % block() != 0 || weight.dims[form_.second ? 0 : 1] != gate.padded) {
    return Fail("weight has shape " + ToString(weight) + ", gate has " + ToString(inputs.back().shape) +
                "; expected a blocked weight with the gate's channels");
  }
  if (form_.second && (inputs[1].shape.rank != 1 || inputs[1].shape.dims[0] != gate.padded)) {
    return Fail("bias has shape " + ToString(inputs[1].shape) + "; expected [" + std::to_string(gate.padded) + "]");
  }
  return form_.second ? ScaleOutput(context, inputs) : ScaleInput(context, inputs);
}

OrtStatus* ScaleKernel::ScaleInput(OrtKernelContext* context, const std::vector<InputTensor>& inputs) const {
  const Shape& weight = inputs[0].shape;
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, weight, &output));
  const auto run = ATTN_DEPLOY_KERNEL(BlockedGate);
  const int64_t taps = weight.dims[2] * weight.dims[3];
  const int64_t row = weight.dims[1] * taps * block();  // what makes `block` output channels
  const auto* gate = static_cast<const float*>(inputs[1].data);
  const int64_t rows_per_block = std::max<int64_t>(ElementsPerBlock(Activation::kNone) / std::max<int64_t>(row, 1), 1);
  const int64_t rows = weight.dims[0] / block();
  return ParallelBlocks(Api(), context, (rows + rows_per_block - 1) / rows_per_block, [&](int64_t part) {
    for (int64_t r = part * rows_per_block; r < std::min((part + 1) * rows_per_block, rows); ++r) {
      const float* from = static_cast<const float*>(inputs[0].data) + r * row;
      float* to = static_cast<float*>(output) + r * row;
      if (taps == 1) {  // [input channels, block]: as pixels, each with its gate
        run(Activation::kNone, true, block(), weight.dims[1], {from, gate, nullptr, to});
        continue;
      }
      for (int64_t i = 0; i < weight.dims[1]; i += block()) {
        for (int64_t tap = 0; tap < taps; ++tap, from += block() * block(), to += block() * block()) {
          run(Activation::kNone, true, block(), block(), {from, gate + i, nullptr, to});
        }
      }
    }
  });
}

OrtStatus* ScaleKernel::ScaleOutput(OrtKernelContext* context, const std::vector<InputTensor>& inputs) const {
  const Shape& weight = inputs[0].shape;
  void* output = nullptr;
  void* bias = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, weight, &output));
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 1, inputs[1].shape, &bias));
  const auto run = ATTN_DEPLOY_KERNEL(BlockedGate);
  const auto* gate = static_cast<const float*>(inputs[2].data);
  // As a map whose planes are blocks of output channels.
  const BlockedMap map = {1, weight.dims[0], weight.dims[1] * weight.dims[2] * weight.dims[3], block()};
  const BlockedPieces pieces(map, ElementsPerBlock(Activation::kNone));
  ATTN_DEPLOY_RETURN_IF_ERROR(
      ParallelPieces(Api(), context, map, pieces, [&](int64_t plane, int64_t, int64_t first, int64_t pixels) {
        const int64_t at = (plane * map.pixels + first) * map.block;
        run(Activation::kNone, false, map.block, pixels,
            {static_cast<const float*>(inputs[0].data) + at, gate + plane * map.block, nullptr,
             static_cast<float*>(output) + at});
      }));
  for (int64_t c = 0; c < map.padded; ++c) {
    static_cast<float*>(bias)[c] = static_cast<const float*>(inputs[1].data)[c] * gate[c];
  }
  return nullptr;
}

bool LikeSecondInput(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  *output = inputs[1];
  for (int64_t d = 0; d < output->rank; ++d) {
    if (output->dims[d] < 0) return false;
  }
  return output->rank > 0;
}

}  // namespace

void AppendBlocked(const OrtApi& api, Operators* operators) {
  for (const BlockedForm& form : kGates) {
    std::vector<Operand> inputs = {{"x"}, {"gate"}};
    if (form.second) inputs.push_back({"residual"});
    operators->push_back(
        std::make_unique<CpuOp>(api, form.name, inputs, MakeBlocked<GateKernel>, LikeFirstInput, &form));
  }
  for (const BlockedForm& form : kActivations) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, std::vector<Operand>{{"x"}},
                                                 MakeBlocked<ActivateKernel>, LikeFirstInput, &form));
  }
  using Infer = std::vector<CpuOp::InferShape>;
  for (const BlockedForm& form : kPools) {
    operators->push_back(std::make_unique<CpuOp>(api, form.name, std::vector<Operand>{{"x"}}, MakeBlocked<PoolKernel>,
                                                 form.second ? LikeFirstInput : LikePooledFirstInput, &form,
                                                 form.second ? Infer{LikePooledFirstInput} : Infer{}));
  }
  for (const BlockedForm& form : kScales) {
    std::vector<Operand> inputs = {{"weight"}};
    if (form.second) inputs.push_back({"bias"});
    inputs.push_back({"gate"});
    operators->push_back(std::make_unique<CpuOp>(api, form.name, inputs, MakeBlocked<ScaleKernel>, LikeFirstInput,
                                                 &form, form.second ? Infer{LikeSecondInput} : Infer{}));
  }
}

}  // namespace attn_deploy::native
