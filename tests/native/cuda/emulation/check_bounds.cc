// A program for the address sanitizer: runs the kernels on memory that ends where their tensors end, so that an access
// outside of them, in global or shared memory, stops it. Numbers are compared elsewhere; here they must only be finite.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "channel_pool.h"
#include "emulated_device.h"
#include "gate.h"
#include "packed_attention.h"

namespace {

using namespace attn_deploy;
using cuda::Element;

std::mt19937 generator(0);

size_t Bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Memory of exactly `count` elements, aligned to 16 bytes, with random values.
struct Tensor {
  Tensor(Element element_, int64_t count_) : element(element_), count(count_) {
    const size_t bytes = static_cast<size_t>(count) * Bytes(element);
    if (posix_memalign(&data, 16, bytes) != 0) std::abort();
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) Set(i, normal(generator));
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { std::free(data); }

  void Set(int64_t i, float v) {
    if (element == Element::kFloat32) static_cast<float*>(data)[i] = v;
    if (element == Element::kFloat16) static_cast<cuda::Half*>(data)[i] = cuda::FromFloat<cuda::Half>(v);
    if (element == Element::kBfloat16) static_cast<cuda::Bfloat16*>(data)[i] = cuda::FromFloat<cuda::Bfloat16>(v);
  }

  float Get(int64_t i) const {
    if (element == Element::kFloat32) return static_cast<const float*>(data)[i];
    if (element == Element::kFloat16) return cuda::ToFloat(static_cast<const cuda::Half*>(data)[i]);
    return cuda::ToFloat(static_cast<const cuda::Bfloat16*>(data)[i]);
  }

  void RequireFinite(const char* what) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!std::isfinite(Get(i))) emulation::Fail(what);
    }
  }

  Element element;
  int64_t count;
  void* data = nullptr;
};

template <typename T>
std::unique_ptr<T[]> Exactly(int64_t count, const std::function<T(int64_t)>& value) {
  std::unique_ptr<T[]> made(new T[static_cast<size_t>(count)]);
  for (int64_t i = 0; i < count; ++i) made[static_cast<size_t>(i)] = value(i);
  return made;
}

struct Case {
  int length;
  int head_dim;
  int windows;
};

// Two samples, two heads; an index map whose last window ends in padding and in numbers that are no token.
void RunWindows(const Case& c, Element element, int compute_capability) {
  const int places = c.windows * c.length;
  const int tokens = places > 3 ? places - 3 : places;
  const Tensor qkv(element, 2LL * tokens * 6 * c.head_dim);
  const Tensor fill(element, 6LL * c.head_dim);
  const Tensor bias(element, 2LL * 2 * c.length * c.length);
  const Tensor output(element, 2LL * tokens * 2 * c.head_dim);
  const auto index = Exactly<int64_t>(places, [&](int64_t i) -> int64_t {
    if (i < tokens) return tokens - 1 - i;
    return i == places - 1 ? int64_t{1} << 40 : -1;
  });
  const auto bias_index = Exactly<int64_t>(c.windows, [](int64_t i) { return i % 3; });  // 2 is no item

  cuda::PackedAttentionArguments p;
  p.qkv = qkv.data;
  p.index = index.get();
  p.fill = fill.data;
  p.bias = bias.data;
  p.bias_index = bias_index.get();
  p.output = output.data;
  p.batch = 2;
  p.tokens = tokens;
  p.heads = 2;
  p.head_dim = c.head_dim;
  p.windows = c.windows;
  p.length = c.length;
  p.bias_items = 2;
  const int64_t square = static_cast<int64_t>(c.length) * c.length;
  const int64_t strides[4] = {2 * square, square, c.length, 1};
  std::memcpy(p.bias_strides, strides, sizeof strides);
  if (LaunchPackedAttention(p, element, {1, compute_capability}, nullptr) != cudaSuccess) emulation::Fail("no launch");
  output.RequireFinite("a windowed result is not finite");
}

// One window of all tokens with everything that a form can have.
void RunPlain(const Case& c, Element element) {
  const Tensor qkv(element, 2LL * c.length * 3 * c.head_dim);
  const Tensor head_scale(element, 1);
  const Tensor bias(element, 2LL * c.length * c.length);
  const Tensor output(element, 2LL * c.length * c.head_dim);
  const auto mask = Exactly<bool>(c.length, [](int64_t i) { return i % 3 != 1; });  // of keys alone
  cuda::PackedAttentionArguments p;
  p.qkv = qkv.data;
  p.head_scale = head_scale.data;
  p.bias = bias.data;
  p.mask = mask.get();
  p.output = output.data;
  p.batch = 2;
  p.tokens = p.length = c.length;
  p.heads = 1;
  p.head_dim = c.head_dim;
  p.softcap = 10.0f;
  p.causal = true;
  p.bias_strides[0] = static_cast<int64_t>(c.length) * c.length;
  p.bias_strides[2] = c.length;
  p.bias_strides[3] = 1;
  p.mask_strides[3] = 1;
  if (LaunchPackedAttention(p, element, {1, 90}, nullptr) != cudaSuccess) emulation::Fail("no launch");
  output.RequireFinite("a plain result is not finite");
}

void RunGate(Element element, int channels, int pixels, bool per_channel) {
  const Tensor x(element, 2LL * channels * pixels);
  const Tensor gate(element, per_channel ? 2LL * channels : 2LL * pixels);
  const Tensor residual(element, x.count);
  const Tensor output(element, x.count);
  const native::Shape shape = {3, {2, channels, pixels}};
  const native::Shape gate_shape = {3, {2, per_channel ? channels : 1, per_channel ? 1 : pixels}};
  const cuda::GateArguments g = {x.data, gate.data, residual.data, output.data, native::PlanGate(shape, gate_shape)};
  if (LaunchGate(g, native::Activation::kSilu, element, {1, 90}, nullptr) != cudaSuccess) emulation::Fail("no launch");
  output.RequireFinite("a gated value is not finite");
}

void RunPool(Element element, int planes, int pixels) {
  const Tensor x(element, static_cast<int64_t>(planes) * pixels);
  const Tensor mean(element, planes);
  const Tensor maximum(element, planes);
  const cuda::ChannelPoolArguments p = {x.data, mean.data, maximum.data, planes, pixels};
  if (LaunchChannelPool(p, element, {1, 90}, nullptr) != cudaSuccess) emulation::Fail("no launch");
  mean.RequireFinite("a mean is not finite");
  maximum.RequireFinite("a maximum is not finite");
}

}  // namespace

// `check_bounds outside` reads one element behind a tensor, to show that the sanitizer is there.
int main(int argc, char**) {
  if (argc > 1) {
    const Tensor x(Element::kFloat32, 64);
    const Tensor mean(Element::kFloat32, 1);
    const cuda::ChannelPoolArguments p = {x.data, mean.data, nullptr, 1, 65};
    return LaunchChannelPool(p, Element::kFloat32, {1, 90}, nullptr);
  }
  for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBfloat16}) {
    for (const Case& c : {Case{1, 8, 2}, Case{7, 5, 2}, Case{49, 32, 1}, Case{65, 64, 1}, Case{17, 128, 2}}) {
      RunWindows(c, element, 90);
      RunPlain(c, element);
    }
    for (const int pixels : {1, 49, 64}) {
      RunGate(element, 3, pixels, true);
      RunGate(element, 3, pixels, false);
      RunPool(element, 3, pixels);
    }
    RunPool(element, 2, 2049);
  }
  RunWindows({20, 40, 2}, Element::kBfloat16, 75);
  std::puts("in bounds");
  return 0;
}
