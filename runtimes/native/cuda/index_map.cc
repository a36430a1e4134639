#include "index_map.h"

#include <string>
#include <vector>

namespace attn_deploy::cuda {

using namespace ort;

namespace {

// The tensor's elements, wherever its memory is.
OrtStatus* ReadInt64(const Kernel& kernel, const OrtValue* value, std::vector<int64_t>* elements) {
  const OrtApi& api = kernel.Api();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  size_t count = 0;
  OrtStatus* status = api.GetTensorShapeElementCount(info, &count);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;
  void* data = nullptr;  // only read
  ATTN_DEPLOY_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  elements->resize(count);
  // On the GPU where ONNX Runtime has moved constants there, else on the host: the driver knows.
  return kernel.CheckCuda(cudaMemcpy(elements->data(), data, count * sizeof(int64_t), cudaMemcpyDefault),
                          "the index map was not read");
}

}  // namespace

OrtStatus* CheckConstantIndex(const Kernel& kernel, const OrtKernelInfo* info, int64_t tokens, bool padded,
                              bool* covers_every_token) {
  *covers_every_token = false;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  ATTN_DEPLOY_RETURN_IF_ERROR(kernel.Api().KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) return nullptr;
  std::vector<int64_t> index;
  ATTN_DEPLOY_RETURN_IF_ERROR(ReadInt64(kernel, value, &index));
  if (tokens < 0) return kernel.Fail("tokens is " + std::to_string(tokens) + "; expected 0 or more");
  std::vector<bool> seen(static_cast<size_t>(tokens), false);
  int64_t covered = 0;
  for (const int64_t token : index) {
    if (padded && token == -1) continue;
    if (token < 0 || token >= tokens) {
      return kernel.Fail("index holds " + std::to_string(token) + "; expected " + (padded ? "-1 to " : "0 to ") +
                         std::to_string(tokens - 1));
    }
    if (seen[static_cast<size_t>(token)]) {
      return kernel.Fail("index holds token " + std::to_string(token) + " twice; expected every token in one window");
    }
    seen[static_cast<size_t>(token)] = true;
    ++covered;
  }
  *covers_every_token = covered == tokens;
  return nullptr;
}

}  // namespace attn_deploy::cuda
