// What sanitizers have to stop at: cases that do on purpose what a kernel must not, to see that a sanitized build is one.
#include <limits>

#include "case.h"

namespace attn_deploy::native::runner {
namespace {

std::vector<Array> ReadBeyond(const Case& c) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{1}, 0);
  const volatile float* values = x.floats();
  outputs[0].floats()[0] = values[x.size()];
  return outputs;
}

std::vector<Array> OverflowInt(const Case& c) {
  volatile int64_t largest = std::numeric_limits<int64_t>::max();
  largest = largest + c.ints.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kInt64, std::vector<int64_t>{largest < 0}, 0);
  return outputs;
}

const Registered kReadBeyond("read_beyond", ReadBeyond);
const Registered kOverflowInt("overflow_int", OverflowInt);

}  // namespace
}  // namespace attn_deploy::native::runner
