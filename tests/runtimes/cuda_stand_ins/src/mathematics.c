/* cuBLAS, cuDNN, cuRAND, cuFFT and NVRTC: handles are given, nothing is computed. Compiled once for each library; what is
 * not here is a generated function that notes its call and succeeds. */
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

#define CREATES(name)                        \
  int name(void **handle) {                  \
    CALL(name, 0, 0);                        \
    *handle = calloc(1, 64);                 \
    return 0;                                \
  }
#define TEXT(name) \
  const char *name(int code) { return code ? "error of the stand-in" : "success"; }

#ifdef STAND_IN_CUBLAS
CREATES(cublasCreate_v2)
TEXT(cublasGetStatusName)
TEXT(cublasGetStatusString)
int cublasGetMathMode(void *handle, int *mode) { return (void)handle, *mode = 0, 0; }
#endif

#ifdef STAND_IN_CUBLASLT
CREATES(cublasLtCreate)
CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatmulPreferenceCreate)
CREATES(cublasLtMatrixTransformDescCreate)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *count) {
  (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
  memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t */
  return *count = wanted > 0, 0;
}
#endif

#ifdef STAND_IN_CUDNN
CREATES(cudnnCreate)
CREATES(cudnnCreateActivationDescriptor)
CREATES(cudnnCreateConvolutionDescriptor)
CREATES(cudnnCreateDropoutDescriptor)
CREATES(cudnnCreateFilterDescriptor)
CREATES(cudnnCreateLRNDescriptor)
CREATES(cudnnCreatePoolingDescriptor)
CREATES(cudnnCreateRNNDataDescriptor)
CREATES(cudnnCreateRNNDescriptor)
CREATES(cudnnCreateReduceTensorDescriptor)
CREATES(cudnnCreateTensorDescriptor)
TEXT(cudnnGetErrorString)
size_t cudnnGetVersion(void) { return 91200; }
void cudnnGetLastErrorString(char *text, size_t size) { strncpy(text, "stand-in", size); }
int cudnnBackendCreateDescriptor(int type, void **descriptor) { return (void)type, *descriptor = calloc(1, 256), 0; }
/* A heuristic finds one engine, and everything that can be counted is zero. */
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *count, void *values) {
  (void)descriptor, (void)name;
  if (count) *count = wanted < 1 ? 1 : 1;
  if (values && type != 15 && wanted > 0) memset(values, 0, 4); /* 15: descriptors, made by the caller */
  return 0;
}
int cudnnGetReductionWorkspaceSize(void *handle, void *reduce, void *a, void *c, size_t *size) {
  return (void)handle, (void)reduce, (void)a, (void)c, *size = 0, 0;
}
int cudnnGetReductionIndicesSize(void *handle, void *reduce, void *a, void *c, size_t *size) {
  return (void)handle, (void)reduce, (void)a, (void)c, *size = 0, 0;
}
#endif

#ifdef STAND_IN_CURAND
CREATES(curandCreateGenerator)
#endif

#ifdef STAND_IN_CUFFT
int cufftCreate(int *plan) { return *plan = 1, 0; }
#endif

#ifdef STAND_IN_NVRTC
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
#endif
