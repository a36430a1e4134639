#include "gate.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "launch.h"

namespace attn_deploy::cuda {
namespace {

using native::Activation;

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 16;

// How the gate's values lie along the elements of one vector.
enum class Gating {
  kOne,      // one value for the whole vector
  kVector,   // as many values as the vector has elements, one after the other and aligned
  kElement,  // each element looks for its own
};

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T elements[kSize];
};

// The reference's limits: relu and silu of NaN are NaN, silu of -infinity is 0.
__device__ float Activate(float v, Activation activation) {
  if (activation == Activation::kRelu) return v < 0.0f ? 0.0f : v;
  if (activation == Activation::kNone) return v;
  const float small = expf(-fabsf(v));
  const float sigmoid = (v < 0.0f ? small : 1.0f) / (1.0f + small);
  return (v < -120.0f ? -120.0f : v) * sigmoid;
}

// Where the gate's value for flat element `at` lies. Index is uint32_t where the tensor's size allows: a division of
// 64 bits takes several times as long.
template <typename Index>
__device__ int64_t GateOffset(const native::GatePlan& plan, Index at) {
  int64_t offset = 0;
  for (int d = plan.rank - 1; d > 0; --d) {
    const Index extent = static_cast<Index>(plan.extents[d]);
    const Index outer = at / extent;
    offset += static_cast<int64_t>(at - outer * extent) * plan.gate_strides[d];
    at = outer;
  }
  return offset + static_cast<int64_t>(at) * plan.gate_strides[0];
}

template <typename T, typename Index>
__device__ T GateElement(const GateArguments& g, Index at, Activation activation) {
  float v = ToFloat(static_cast<const T*>(g.x)[at]) *
            ToFloat(static_cast<const T*>(g.gate)[GateOffset<Index>(g.plan, at)]);
  if (g.residual != nullptr) v += ToFloat(static_cast<const T*>(g.residual)[at]);
  return FromFloat<T>(Activate(v, activation));
}

template <typename T, typename Index, Gating kGating>
__device__ void GateVector(const GateArguments& g, Index at, Activation activation) {
  constexpr int kSize = Vector<T>::kSize;
  const auto load = [at](const void* base) {
    return *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(base) + at);
  };
  const Vector<T> x = load(g.x);
  Vector<T> residual = {};
  if (g.residual != nullptr) residual = load(g.residual);
  const T* values = static_cast<const T*>(g.gate);
  Vector<T> gate;
  if (kGating == Gating::kVector) {
    gate = *reinterpret_cast<const Vector<T>*>(values + GateOffset<Index>(g.plan, at));
  } else if (kGating == Gating::kOne) {
    gate.elements[0] = values[GateOffset<Index>(g.plan, at)];
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) gate.elements[e] = values[GateOffset<Index>(g.plan, at + e)];
  }
  Vector<T> output;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    float v = ToFloat(x.elements[e]) * ToFloat(gate.elements[kGating == Gating::kOne ? 0 : e]);
    if (g.residual != nullptr) v += ToFloat(residual.elements[e]);
    output.elements[e] = FromFloat<T>(Activate(v, activation));
  }
  *reinterpret_cast<Vector<T>*>(static_cast<T*>(g.output) + at) = output;
}

// Elements below `vectors` * kSize go by vectors, the rest one by one.
template <typename T, typename Index, Gating kGating>
__global__ void __launch_bounds__(kThreads) Gate(const GateArguments g, Activation activation, Index vectors) {
  const Index size = static_cast<Index>(g.plan.size);
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  const Index first = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  for (Index i = first; i < vectors; i += step) GateVector<T, Index, kGating>(g, i * Vector<T>::kSize, activation);
  for (Index i = vectors * Vector<T>::kSize + first; i < size; i += step) {
    static_cast<T*>(g.output)[i] = GateElement<T, Index>(g, i, activation);
  }
}

template <typename T>
Gating GatingOf(const GateArguments& g) {
  const int inner = g.plan.rank - 1;
  if (g.plan.extents[inner] % Vector<T>::kSize != 0) return Gating::kElement;
  if (g.plan.gate_strides[inner] == 0) return Gating::kOne;
  return reinterpret_cast<uintptr_t>(g.gate) % 16 == 0 ? Gating::kVector : Gating::kElement;
}

bool AreAligned(const GateArguments& g) {
  const auto bits = reinterpret_cast<uintptr_t>(g.x) | reinterpret_cast<uintptr_t>(g.residual) |
                    reinterpret_cast<uintptr_t>(g.output);
  return bits % 16 == 0;
}

template <typename T, typename Index>
cudaError_t LaunchOf(const GateArguments& g, Activation activation, const Device& device, cudaStream_t stream) {
  const int64_t vectors = AreAligned(g) ? g.plan.size / Vector<T>::kSize : 0;
  const int64_t work = vectors > 0 ? vectors : g.plan.size;
  const int64_t most = static_cast<int64_t>(device.multiprocessors) * kBlocksPerMultiprocessor;
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>((work + kThreads - 1) / kThreads, 1, most)));
  const auto launch = [&](auto kernel) {
    return Launch(kernel, grid, kThreads, 0, stream, g, activation, static_cast<Index>(vectors));
  };
  switch (GatingOf<T>(g)) {
    case Gating::kOne:
      return launch(Gate<T, Index, Gating::kOne>);
    case Gating::kVector:
      return launch(Gate<T, Index, Gating::kVector>);
    case Gating::kElement:
      break;
  }
  return launch(Gate<T, Index, Gating::kElement>);
}

template <typename T>
cudaError_t LaunchOf(const GateArguments& g, Activation activation, const Device& device, cudaStream_t stream) {
  // Room for the step behind the last element.
  if (g.plan.size <= std::numeric_limits<int32_t>::max()) {
    return LaunchOf<T, uint32_t>(g, activation, device, stream);
  }
  return LaunchOf<T, uint64_t>(g, activation, device, stream);
}

}  // namespace

cudaError_t LaunchGate(const GateArguments& arguments, native::Activation activation, Element element,
                       const Device& device, cudaStream_t stream) {
  if (arguments.plan.size == 0) return cudaSuccess;
  switch (element) {
    case Element::kFloat16:
      return LaunchOf<Half>(arguments, activation, device, stream);
    case Element::kBfloat16:
      return LaunchOf<Bfloat16>(arguments, activation, device, stream);
    case Element::kFloat32:
      break;
  }
  return LaunchOf<float>(arguments, activation, device, stream);
}

}  // namespace attn_deploy::cuda
