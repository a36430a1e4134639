#include "attention_operator.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace attn_deploy::native {

using namespace ort;

namespace {

std::string NameOf(const char* kind, const AttentionFlags& f) {
  std::string name = kind;
  const std::pair<bool, const char*> parts[] = {{f.indexed, "Indexed"}, {f.padded, "Padded"},   {f.grouped, "Grouped"},
                                                {f.cosine, "Cosine"},   {f.softcap, "Softcap"}, {f.causal, "Causal"},
                                                {f.bias, "Bias"},       {f.mask, "Mask"}};
  for (const auto& [has, part] : parts) {
    if (has) name += part;
  }
  return name;
}

}  // namespace

AttentionOp::AttentionOp(const OrtApi& api_, const char* kind, const AttentionFlags& flags_,
                         std::vector<Operand> inputs_, MakeKernel make_, InferShape infer_)
    : CpuOp(api_, NameOf(kind, flags_), std::move(inputs_), make_, infer_), flags(flags_) {}

std::vector<AttentionFlags> AllScores() {
  std::vector<AttentionFlags> all;
  for (const bool bias : {false, true}) {
    for (const bool mask : {false, true}) {
      AttentionFlags flags;
      flags.bias = bias;
      flags.mask = mask;
      for (const bool causal : {false, true}) {
        for (const bool softcap : {false, true}) {
          flags.causal = causal;
          flags.softcap = softcap;
          all.push_back(flags);
        }
      }
      flags.causal = flags.softcap = false;
      flags.cosine = true;
      all.push_back(flags);
    }
  }
  return all;
}

void AppendScoreOperands(const AttentionFlags& flags, std::vector<Operand>* inputs) {
  if (flags.cosine) inputs->push_back({"head_scale"});
  if (flags.bias) inputs->push_back({flags.indexed ? "windows_bias" : "bias"});
  if (flags.bias && flags.indexed) inputs->push_back({"bias_index", ElementType::kInt64});
  if (flags.mask) inputs->push_back({"mask", ElementType::kBool});
}

Shape MakeShape(std::initializer_list<int64_t> dims) {
  Shape shape;
  for (const int64_t dim : dims) shape.dims[shape.rank++] = dim;
  return shape;
}

void BroadcastStrides(const Shape& shape, int64_t (&strides)[4]) {
  int64_t stride = 1;
  for (int d = 3; d >= 0; --d) {
    strides[d] = shape.dims[d] == 1 ? 0 : stride;
    stride *= shape.dims[d];
  }
}

OrtStatus* AttentionKernel::Initialize(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "scale", &scale_));
  if (!flags.softcap) return nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetFloat(Api(), info, "softcap", &softcap_));
  if (softcap_ > 0.0f) return nullptr;
  return Fail("softcap is " + std::to_string(softcap_) + "; expected more than 0");
}

OrtStatus* AttentionKernel::Expect(const char* name, const Shape& got, const Shape& expected) const {
  if (got == expected) return nullptr;
  return Fail(std::string(name) + " has shape " + ToString(got) + "; expected " + ToString(expected));
}

OrtStatus* AttentionKernel::ExpectBroadcast(const char* name, const Shape& got, const Shape& full) const {
  bool fits = got.rank == 4;
  for (int d = 0; fits && d < 4; ++d) fits = got.dims[d] == 1 || got.dims[d] == full.dims[d];
  if (fits) return nullptr;
  return Fail(std::string(name) + " has shape " + ToString(got) + "; expected one that broadcasts to " +
              ToString(full));
}

AttentionProblem AttentionKernel::Start() const {
  AttentionProblem problem;
  problem.scale = scale_;
  problem.shape.softcap = softcap_;
  problem.shape.causal = flags.causal;
  problem.shape.cosine = flags.cosine;
  return problem;
}

OrtStatus* AttentionKernel::ReadScores(const std::vector<InputTensor>& inputs, size_t next, AttentionProblem* p) const {
  const Shape full = MakeShape({p->batch, p->heads, p->shape.query_len, p->shape.key_len});
  if (flags.cosine) {
    const InputTensor& head_scale = inputs[next++];
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("head_scale", head_scale.shape, MakeShape({p->heads})));
    p->head_scale = static_cast<const float*>(head_scale.data);
  }
  if (flags.bias) {
    const InputTensor& bias = inputs[next++];
    p->bias = static_cast<const float*>(bias.data);
    BroadcastStrides(bias.shape, p->bias_strides);
    if (!flags.indexed) ATTN_DEPLOY_RETURN_IF_ERROR(ExpectBroadcast("bias", bias.shape, full));
  }
  if (flags.bias && flags.indexed) {
    const Shape& bias = inputs[next - 1].shape;
    const InputTensor& bias_index = inputs[next++];
    const int64_t distinct = bias.rank == 4 ? std::max<int64_t>(bias.dims[0], 1) : 1;
    ATTN_DEPLOY_RETURN_IF_ERROR(
        Expect("windows_bias", bias, MakeShape({distinct, full.dims[1], full.dims[2], full.dims[3]})));
    ATTN_DEPLOY_RETURN_IF_ERROR(Expect("bias_index", bias_index.shape, MakeShape({p->windows})));
    p->bias_index = static_cast<const int64_t*>(bias_index.data);
    for (int64_t w = 0; w < p->windows; ++w) {
      if (p->bias_index[w] >= 0 && p->bias_index[w] < distinct) continue;
      return Fail("bias_index holds " + std::to_string(p->bias_index[w]) + "; expected 0 to " +
                  std::to_string(distinct - 1));
    }
  }
  if (!flags.mask) return nullptr;
  const InputTensor& mask = inputs[next];
  p->mask = static_cast<const bool*>(mask.data);
  BroadcastStrides(mask.shape, p->mask_strides);
  return ExpectBroadcast("mask", mask.shape, full);
}

OrtStatus* AttentionKernel::Run(const OrtKernelContext* context, const AttentionProblem& problem) const {
  const AttentionBlocks blocks = SplitAttention(problem);
  std::atomic<bool> out_of_memory{false};
  ATTN_DEPLOY_RETURN_IF_ERROR(ParallelBlocks(Api(), context, blocks.count, [&](int64_t block) {
    float* scratch = nullptr;
    try {
      scratch = ThreadScratch().Floats(blocks.scratch_floats);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      return;
    }
    RunAttentionUnits(problem, blocks, block, scratch);
  }));
  if (!out_of_memory) return nullptr;
  return Fail("no memory for " + std::to_string(blocks.scratch_floats) + " floats of scratch memory");
}

}  // namespace attn_deploy::native
