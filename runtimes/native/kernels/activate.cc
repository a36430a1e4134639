#include "activate.h"

#include "vector_activations.h"

namespace attn_deploy::native::ATTN_DEPLOY_ISA {

void Activate(Activation activation, const float* x, float* y, int64_t count) {
  WithActivation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Store(y + i, Activated<kActivation>(Load(x + i)));
    if (i < count) StorePartial(y + i, Activated<kActivation>(LoadPartial(x + i, count - i)), count - i);
  });
}

}  // namespace attn_deploy::native::ATTN_DEPLOY_ISA
