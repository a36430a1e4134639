// The Attention forms of attn_deploy/ops/attention.py.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "attention_operator.h"
#include "operators.h"

namespace attn_deploy::native {
namespace {

using namespace ort;

TokenStrides DenseStrides(const Shape& shape) {
  return {shape.dims[1] * shape.dims[2] * shape.dims[3], shape.dims[2] * shape.dims[3], shape.dims[3]};
}

class SeparateAttentionKernel : public AttentionKernel {
 public:
  using AttentionKernel::AttentionKernel;

  OrtStatus* Compute(OrtKernelContext* context) const override;

 private:
  // [batch, len, heads, dim] of all three.
  OrtStatus* Check(const Shape& query, const Shape& key, const Shape& value) const;
};

OrtStatus* SeparateAttentionKernel::Check(const Shape& query, const Shape& key, const Shape& value) const {
  const std::string got =
      "query has shape " + ToString(query) + ", key " + ToString(key) + ", value " + ToString(value) + "; expected ";
  if (query.rank != 4 || key.rank != 4 || value.rank != 4) return Fail(got + "[batch, len, heads, dim] of each");
  if (query.dims[3] != key.dims[3] || query.dims[3] < 1) {
    return Fail(got + "query and key of the same head_dim, at least 1");
  }
  for (int d = 0; d < 3; ++d) {
    if (key.dims[d] != value.dims[d]) return Fail(got + "key and value of the same batch, length and heads");
  }
  const int64_t heads = query.dims[2];
  const int64_t kv_heads = key.dims[2];
  const bool heads_fit = flags.grouped ? kv_heads > 0 && heads % kv_heads == 0 : heads == kv_heads;
  if (query.dims[0] == key.dims[0] && heads_fit) return nullptr;
  return Fail(got + (flags.grouped ? "one batch, and heads that kv_heads divides" : "one batch and number of heads"));
}

OrtStatus* SeparateAttentionKernel::Compute(OrtKernelContext* context) const {
  std::vector<InputTensor> inputs;
  ATTN_DEPLOY_RETURN_IF_ERROR(GetInputs(context, &inputs));
  const Shape& query = inputs[0].shape;
  const Shape& key = inputs[1].shape;
  const Shape& value = inputs[2].shape;
  ATTN_DEPLOY_RETURN_IF_ERROR(Check(query, key, value));
  AttentionProblem problem = Start();
  problem.batch = query.dims[0];
  problem.heads = query.dims[2];
  problem.kv_heads = key.dims[2];
  problem.shape.query_len = query.dims[1];
  problem.shape.key_len = key.dims[1];
  problem.shape.head_dim = query.dims[3];
  problem.shape.value_dim = value.dims[3];
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadScores(inputs, 3, &problem));

  const Shape output_shape = MakeShape({query.dims[0], query.dims[1], query.dims[2], value.dims[3]});
  void* output = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(MakeOutput(Api(), context, 0, output_shape, &output));
  problem.query = static_cast<const float*>(inputs[0].data);
  problem.key = static_cast<const float*>(inputs[1].data);
  problem.value = static_cast<const float*>(inputs[2].data);
  problem.output = static_cast<float*>(output);
  problem.query_strides = DenseStrides(query);
  problem.key_strides = DenseStrides(key);
  problem.value_strides = DenseStrides(value);
  problem.output_strides = DenseStrides(output_shape);
  const int64_t elements = query.dims[0] * problem.output_strides.sample;
  if (elements == 0) return nullptr;
  if (problem.shape.key_len == 0) {  // a row that sees no key
    std::fill_n(problem.output, elements, 0.0f);
    return nullptr;
  }
  return Run(context, problem);
}

bool Infer(const std::vector<Shape>& inputs, Shape* output, int (&)[kMaxRank]) {
  const Shape& query = inputs[0];
  const Shape& value = inputs[2];
  if (query.rank != 4 || value.rank != 4 || value.dims[3] < 0) return false;
  *output = MakeShape({query.dims[0], query.dims[1], query.dims[2], value.dims[3]});
  return true;
}

}  // namespace

void AppendAttention(const OrtApi& api, Operators* operators) {
  for (AttentionFlags flags : AllScores()) {
    for (const bool grouped : {false, true}) {
      if (grouped && flags.cosine) continue;
      flags.grouped = grouped;
      std::vector<Operand> inputs = {{"query"}, {"key"}, {"value"}};
      AppendScoreOperands(flags, &inputs);
      operators->push_back(std::make_unique<AttentionOp>(api, "Attention", flags, std::move(inputs),
                                                         MakeAttentionKernel<SeparateAttentionKernel>, Infer));
    }
  }
}

}  // namespace attn_deploy::native
