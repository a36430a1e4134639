#include "activate.h"

#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {
namespace {

template <Activation kActivation>
void Run(const float* x, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(y + i, Activated<kActivation>(Load(x + i)));
  if (i < count) StorePartial(y + i, Activated<kActivation>(LoadPartial(x + i, count - i)), count - i);
}

}  // namespace

void Activate(Activation activation, const float* x, float* y, int64_t count) {
  switch (activation) {
    case Activation::kRelu:
      return Run<Activation::kRelu>(x, y, count);
    case Activation::kSilu:
      return Run<Activation::kSilu>(x, y, count);
    case Activation::kNone:
      return Run<Activation::kNone>(x, y, count);
  }
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
