// Cases of the kernel RunQuantizedGate: ints {activation, pieces, x_zero, y_zero, residual_zero}, inputs {x [pixels,
// channels], x_scale, gate, inverse, residual_scale, all [channels][, residual]}, output like x, made in `pieces` ranges.
// And of RunQuantizedPool: ints {zero, channels of a piece}, inputs {x, scale}, output [channels].
#include "case.h"
#include "kernels/quantized_gate.h"
#include "scratch.h"

namespace attn_deploy::native::runner {
namespace {

const uint8_t* Bytes(const Array& array) { return reinterpret_cast<const uint8_t*>(array.bytes()); }

std::vector<Array> RunGateCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kUint8, x.dims, 1);
  QuantizedGateArrays arrays;
  arrays.x = Bytes(x);
  arrays.x_scale = c.inputs.at(1).floats();
  arrays.gate = c.inputs.at(2).floats();
  arrays.inverse = c.inputs.at(3).floats();
  arrays.x_zero = static_cast<uint8_t>(c.ints.at(2));
  arrays.y_zero = static_cast<uint8_t>(c.ints.at(3));
  if (c.inputs.size() > 5) {
    arrays.residual = Bytes(c.inputs[5]);
    arrays.residual_scale = c.inputs.at(4).floats();
    arrays.residual_zero = static_cast<uint8_t>(c.ints.at(4));
  }
  arrays.y = reinterpret_cast<uint8_t*>(outputs[0].bytes());
  arrays.channels = x.dims.at(1);
  AlignedBuffer scratch;
  float* const memory = scratch.Floats(ATTN_DEPLOY_INT8_KERNEL(QuantizedGateScratch)(arrays.channels));
  const int64_t pixels = x.dims.at(0);
  const int64_t pieces = c.ints.at(1);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    ATTN_DEPLOY_INT8_KERNEL(RunQuantizedGate)
    (arrays, static_cast<Activation>(c.ints.at(0)), pixels * piece / pieces, pixels * (piece + 1) / pieces, memory);
  }
  return outputs;
}

std::vector<Array> RunPoolCase(const Case& c) {
  const Array& x = c.inputs.at(0);
  const int64_t channels = x.dims.at(1);
  const int64_t piece = c.ints.at(1);
  std::vector<Array> outputs;
  outputs.emplace_back(Type::kFloat, std::vector<int64_t>{channels}, 1);
  for (int64_t begin = 0; begin < channels; begin += piece) {
    const int64_t end = begin + piece < channels ? begin + piece : channels;
    ATTN_DEPLOY_INT8_KERNEL(RunQuantizedPool)
    (Bytes(x), x.dims.at(0), channels, c.inputs.at(1).floats(), static_cast<uint8_t>(c.ints.at(0)), begin, end,
     outputs[0].floats());
  }
  return outputs;
}

const Registered kGate("quantized_gate", RunGateCase);
const Registered kPool("quantized_pool", RunPoolCase);

}  // namespace
}  // namespace attn_deploy::native::runner
