// The PackedAttention forms of attn_deploy/ops/packed_attention.py.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "attention_operator.h"
#include "index_map.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

class PackedAttentionKernel : public AttentionKernel {
 public:
  using AttentionKernel::AttentionKernel;

  OrtStatus* Initialize(const OrtKernelInfo* info) override;
  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  OrtStatus* ReadQkv(const InputTensor& qkv, AttentionProblem* problem) const;
  OrtStatus* ReadIndex(const InputTensor& index, const InputTensor* fill, AttentionProblem* problem,
                       bool* covers_every_token) const;

  int64_t tokens_ = 0;
  bool index_is_checked_ = false;  // a constant, found right
  bool index_covers_every_token_ = false;
};

OrtStatus* PackedAttentionKernel::Initialize(const OrtKernelInfo* info) {
  ATTN_DEPLOY_RETURN_IF_ERROR(AttentionKernel::Initialize(info));
  if (!flags.indexed) return nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInt(Api(), info, "tokens", &tokens_));
  InputTensor index;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetConstant(Api(), info, 1, &index));
  if (!index.present || index.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 || index.shape.rank != 2) return nullptr;
  const std::string wrong = CheckIndexMap(static_cast<const int64_t*>(index.data),
                                          index.shape.dims[0] * index.shape.dims[1], tokens_, flags.padded,
                                          &index_covers_every_token_);
  if (!wrong.empty()) return Fail(wrong);
  index_is_checked_ = true;
  return nullptr;
}

OrtStatus* PackedAttentionKernel::ReadQkv(const InputTensor& qkv, AttentionProblem* p) const {
  const Shape& shape = qkv.shape;
  if (shape.rank != 5 || shape.dims[2] != 3) {
    return Fail("qkv has shape " + ToString(shape) + "; expected [batch, tokens, 3, heads, head_dim]");
  }
  const int64_t tokens = shape.dims[1];
  const int64_t head_dim = shape.dims[4];
  p->batch = shape.dims[0];
  p->heads = p->kv_heads = shape.dims[3];
  p->shape.query_len = p->shape.key_len = tokens;
  p->shape.head_dim = p->shape.value_dim = head_dim;
  const int64_t channels = p->heads * head_dim;
  p->query = static_cast<const float*>(qkv.data);
  p->key = p->query + channels;
  p->value = p->key + channels;
  p->query_strides = p->key_strides = p->value_strides = {tokens * 3 * channels, 3 * channels, head_dim};
  p->output_strides = {tokens * channels, channels, head_dim};
  return nullptr;
}

OrtStatus* PackedAttentionKernel::ReadIndex(const InputTensor& index, const InputTensor* fill, AttentionProblem* p,
                                            bool* covers_every_token) const {
  if (p->shape.query_len != tokens_) {
    return Fail("qkv has " + std::to_string(p->shape.query_len) + " tokens; expected " + std::to_string(tokens_));
  }
  const Shape& shape = index.shape;
  if (shape.rank != 2 || (fill == nullptr && shape.dims[0] * shape.dims[1] != tokens_)) {
    return Fail("index has shape " + ToString(shape) + "; expected [windows, length]" +
                (fill == nullptr ? " of " + std::to_string(tokens_) + " tokens" : ""));
  }
  p->index = static_cast<const int64_t*>(index.data);
  p->windows = shape.dims[0];
  p->shape.query_len = p->shape.key_len = shape.dims[1];
  *covers_every_token = index_covers_every_token_;
  if (!index_is_checked_) {
    const std::string wrong =
        CheckIndexMap(p->index, shape.dims[0] * shape.dims[1], tokens_, flags.padded, covers_every_token);
    if (!wrong.empty()) return Fail(wrong);
  }
  if (fill == nullptr) return nullptr;
  p->fill = static_cast<const float*>(fill->data);
  return Expect("fill", fill->shape, MakeShape({3, p->heads, p->shape.head_dim}));
}

OrtStatus* PackedAttentionKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  AttentionProblem problem = Start();
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadQkv(inputs[0], &problem));
  const Shape output_shape =
      MakeShape({problem.batch, problem.shape.query_len, problem.heads * problem.shape.head_dim});
  bool writes_all = true;
  size_t next = 1;
  if (flags.indexed) {
    const InputTensor& index = inputs[next++];
    const InputTensor* fill = flags.padded ? &inputs[next++] : nullptr;
    ATTN_DEPLOY_RETURN_IF_ERROR(ReadIndex(index, fill, &problem, &writes_all));
  }
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadScores(inputs, next, &problem));
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, output_shape, &output));
  const int64_t elements = output_shape.dims[0] * output_shape.dims[1] * output_shape.dims[2];
  if (elements == 0) return nullptr;
  problem.output = static_cast<float*>(output);
  if (!writes_all) std::fill_n(problem.output, elements, 0.0f);
  return Run(context, problem);
}

bool Infer(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  const Shape& qkv = inputs[0];
  if (qkv.rank != 5 || qkv.dims[3] < 0 || qkv.dims[4] < 0) return false;
  *output = MakeShape({qkv.dims[0], qkv.dims[1], qkv.dims[3] * qkv.dims[4]});
  return true;
}

std::vector<AttentionFlags> AllForms() {
  std::vector<AttentionFlags> all = AllScores();
  AttentionFlags flags;
  flags.indexed = true;
  for (const bool padded : {false, true}) {
    for (const bool bias : {false, true}) {
      for (const bool cosine : {false, true}) {
        flags.padded = padded;
        flags.bias = bias;
        flags.cosine = cosine;
        all.push_back(flags);
      }
    }
  }
  return all;
}

}  // namespace

void AppendPackedAttention(const OrtApi& api, Operators* operators) {
  for (const AttentionFlags& flags : AllForms()) {
    std::vector<Operand> inputs = {{"qkv"}};
    if (flags.indexed) inputs.push_back({"index", ElementType::kInt64});
    if (flags.padded) inputs.push_back({"fill"});
    AppendScoreOperands(flags, &inputs);
    operators->push_back(std::make_unique<AttentionOp>(api, "PackedAttention", flags, std::move(inputs),
                                                       MakeAttentionKernel<PackedAttentionKernel>, Infer));
  }
}

}  // namespace attn_deploy::native
