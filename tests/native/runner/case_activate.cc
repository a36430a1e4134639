// Cases of the kernel Activate: ints {activation}, inputs {x}, output like x.
#include "case.h"
#include "kernels/activate.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> RunCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, x.dims, 0);
  ATTN_DEPLOY_KERNEL(Activate)(static_cast<Activation>(c.ints.at(0)), x.floats(), outputs[0].floats(), x.size());
  return outputs;
}

const Registered kRegistered("activate", RunCase);

}  // namespace
}  // namespace attn_deploy::native::runner
