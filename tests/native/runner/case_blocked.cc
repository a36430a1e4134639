// Cases of the kernels on the blocked layout and on pooled vectors.
#include "case.h"
#include "kernels/blocked_gate.h"
#include "kernels/blocked_pool.h"
#include "kernels/excite.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> OutputLike(const Array& x) {
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, x.dims, 1);
  return outputs;
}

Activation ActivationOf(const Case& c) { return static_cast<Activation>(c.ints.at(0)); }

// ints {activation, per pixel}, inputs {x [pixels, block], gate[, residual]}.
std::vector<Array> RunGateCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs = OutputLike(x);
  const float* residual = c.inputs.size() > 2 ? c.inputs[2].floats() : nullptr;
  ATTN_DEPLOY_KERNEL(BlockedGate)
  (ActivationOf(c), c.ints.at(1) != 0, x.dims.at(1), x.dims.at(0),
   {x.floats(), c.inputs.at(1).floats(), residual, outputs[0].floats()});
  return outputs;
}

// ints {activation, channels}, inputs {x [pixels, block]}.
std::vector<Array> RunActivateCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs = OutputLike(x);
  ATTN_DEPLOY_KERNEL(BlockedActivate)
  (ActivationOf(c), x.dims.at(1), c.ints.at(1), x.dims.at(0), x.floats(), outputs[0].floats());
  return outputs;
}

// ints {parts}, inputs {x [pixels, block]}, output mean [block].
std::vector<Array> RunPoolCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  const int64_t pixels = x.dims.at(0);
  const int64_t block = x.dims.at(1);
  const int64_t parts = c.ints.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{block}, 1);
  const Array sums(Type::kFloat, {parts, block}, 0);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * pixels / parts;
    ATTN_DEPLOY_KERNEL(BlockedSum)
    (block, (part + 1) * pixels / parts - begin, x.floats() + begin * block, sums.floats() + part * block);
  }
  ATTN_DEPLOY_KERNEL(BlockedMean)(block, parts, pixels, sums.floats(), outputs[0].floats());
  return outputs;
}

// ints {activation, rows per call}, inputs {pooled [channels], weight [reduced, channels], bias [reduced]}.
std::vector<Array> RunHiddenCase(const Case& c) {
  std::vector<Array> outputs = OutputLike(c.inputs.at(2));
  const int64_t reduced = c.inputs[2].size();
  for (int64_t begin = 0; begin < reduced; begin += c.ints.at(1)) {
    const int64_t end = begin + c.ints[1] < reduced ? begin + c.ints[1] : reduced;
    ATTN_DEPLOY_KERNEL(ExciteHidden)
    (ActivationOf(c), c.inputs[0].floats(), c.inputs[1].floats(), c.inputs[2].floats(), c.inputs[0].size(), begin, end,
     outputs[0].floats());
  }
  return outputs;
}

// ints {activation, channels}, inputs {hidden [reduced], weight [reduced, panel], bias [panel]}.
std::vector<Array> RunExciteGateCase(const Case& c) {
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{c.ints.at(1)}, 1);
  if (c.inputs.at(2).size() != kExcitePanel) Reject("a panel has another width");
  ATTN_DEPLOY_KERNEL(ExciteGate)
  (ActivationOf(c), c.inputs[0].floats(), c.inputs[1].floats(), c.inputs[2].floats(), c.inputs[0].size(), c.ints[1],
   outputs[0].floats());
  return outputs;
}

// ints {activation}, inputs {padded [channels + taps - 1], weight [taps]}.
std::vector<Array> RunEcaCase(const Case& c) {
  const int64_t taps = c.inputs.at(1).size();
  const int64_t channels = c.inputs[0].size() - taps + 1;
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{channels}, 1);
  ATTN_DEPLOY_KERNEL(EcaGate)
  (ActivationOf(c), c.inputs[0].floats(), c.inputs[1].floats(), taps, channels, outputs[0].floats());
  return outputs;
}

const Registered kGate("blocked_gate", RunGateCase);
const Registered kActivate("blocked_activate", RunActivateCase);
const Registered kPool("blocked_pool", RunPoolCase);
const Registered kHidden("excite_hidden", RunHiddenCase);
const Registered kExciteGate("excite_gate", RunExciteGateCase);
const Registered kEca("eca_gate", RunEcaCase);

}  // namespace
}  // namespace attn_deploy::native::runner
