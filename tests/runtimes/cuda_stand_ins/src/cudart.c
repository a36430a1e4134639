/* libcudart.so.13: CUDA's runtime for one made device of compute capability 9.0, on which no kernel runs. */
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

#define STREAM(stream) ((StandInStream *)(stream))
#define EVENT(event) ((StandInEvent *)(event))

static __thread cudaError_t last;
static cudaError_t note(int status) {
  if (status) last = (cudaError_t)status;
  return (cudaError_t)status;
}
#define TRY(expression)                     \
  do {                                      \
    int try_status = (expression);          \
    if (try_status) return note(try_status); \
  } while (0)
#define ENTER(name, first, second) TRY(stand_in_call(#name, (intptr_t)(first), (intptr_t)(second)))

cudaError_t cudaGetLastError(void) {
  cudaError_t status = last;
  last = cudaSuccess;
  return status;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
  return error ? "cudaErrorOfTheStandIn" : "cudaSuccess";
}
const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  if (error == cudaErrorStreamCaptureInvalidated) return "operation failed due to a previous error during capture";
  return error ? "error of the stand-in" : "no error";
}

/* -- device ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return note(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) {
  ENTER(cudaDeviceSynchronize, 0, 0);
  if (stand_in_any_capture()) return stand_in_break_capture(), note(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  TRY(device ? cudaErrorInvalidDevice : cudaSuccess);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in: no GPU, no kernel runs");
  size_t available;
  stand_in_memory(&available, &p->totalGlobalMem);
  p->major = 9, p->minor = 0;
  p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 52428800;
  for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = i < 2 ? 1024 : 64, p->maxGridSize[i] = i ? 65535 : 2147483647;
  p->memoryPoolsSupported = p->unifiedAddressing = p->managedMemory = p->concurrentKernels = 1;
  p->cooperativeLaunch = 1, p->asyncEngineCount = 3;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  TRY(cudaGetDeviceProperties(&p, device));
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

/* -- memory ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaMalloc(void **pointer, size_t size) {
  ENTER(cudaMalloc, size, 0);
  return note(stand_in_allocate(pointer, size, STAND_IN_DEVICE));
}
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
  ENTER(cudaMallocFromPoolAsync, size, stream);
  (void)pool;
  return note(stand_in_allocate(pointer, size, STAND_IN_DEVICE));
}
cudaError_t cudaFree(void *pointer) { return note(stand_in_free(pointer)); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return (void)stream, note(stand_in_free(pointer)); }
cudaError_t cudaMallocHost(void **pointer, size_t size) { return note(stand_in_allocate(pointer, size, STAND_IN_HOST)); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return (void)flags, cudaMallocHost(pointer, size); }
cudaError_t cudaFreeHost(void *pointer) { return note(stand_in_free(pointer)); }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { return stand_in_memory(available, total), cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  ENTER(cudaMemcpy, size, kind);
  return memmove(to, from, size), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER(cudaMemcpyAsync, kind, stream);
  return stand_in_copy(to, from, size, STREAM(stream)), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  ENTER(cudaMemcpy2DAsync, kind, stream);
  for (size_t row = 0; row < height; row++)
    stand_in_copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, STREAM(stream));
  return cudaSuccess;
}
cudaError_t cudaMemset(void *pointer, int value, size_t size) { return memset(pointer, value, size), cudaSuccess; }
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
  return (void)stream, memset(pointer, value, size), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  int kind = stand_in_kind(pointer, NULL, NULL);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = kind == STAND_IN_DEVICE ? cudaMemoryTypeDevice
                     : kind == STAND_IN_HOST ? cudaMemoryTypeHost
                                             : cudaMemoryTypeUnregistered;
  attributes->devicePointer = kind ? (void *)pointer : NULL;
  attributes->hostPointer = kind == STAND_IN_DEVICE ? NULL : (void *)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *props) {
  return (void)props, *pool = malloc(16), cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  return (void)pool, (void)attribute, memset(value, 0, 8), cudaSuccess;
}

/* -- streams, events, graphs ------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return (void)flags, *stream = (cudaStream_t)stand_in_stream_new(), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return stand_in_stream_free(STREAM(stream)), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER(cudaStreamSynchronize, stream, 0);
  return note(stand_in_stream_wait(STREAM(stream)));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  ENTER(cudaStreamWaitEvent, stream, event);
  return (void)flags, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = (enum cudaStreamCaptureStatus)stand_in_stream_capturing(STREAM(stream)), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  ENTER(cudaStreamBeginCapture, stream, mode);
  return note(stand_in_stream_begin(STREAM(stream)));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  int status = stand_in_stream_end(STREAM(stream), (void **)graph); /* ends it in any case */
  ENTER(cudaStreamEndCapture, stream, 0);
  return note(status);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  ENTER(cudaGraphInstantiate, graph, flags);
  return *executable = malloc(sizeof(void *)), memcpy(*executable, graph, sizeof(void *)), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ENTER(cudaGraphLaunch, executable, stream);
  return stand_in_launch(executable), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return free(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return free(executable), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return (void)flags, *event = (cudaEvent_t)stand_in_event_new(), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  ENTER(cudaEventRecord, event, stream);
  return stand_in_event_record(EVENT(event), STREAM(stream)), cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return (void)flags, cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  return *ms = stand_in_event_ms(EVENT(begin), EVENT(end)), cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  if (!stand_in_stream_capturing(STREAM(stream))) function(data);
  return cudaSuccess;
}

/* -- kernels: known, asked for, never run ------------------------------------------------------------------------ */

static __thread struct {
  struct dim3 grid, block;
  size_t shared;
  void *stream;
} launch;

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return (void)binary, &handle;
}
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, struct CUstream_st *stream) {
  launch.grid = grid, launch.block = block, launch.shared = shared, launch.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void *stream) {
  *grid = launch.grid, *block = launch.block, *shared = launch.shared, *(void **)stream = launch.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) { return *kernel = (cudaKernel_t)entry, cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  ENTER(cudaLaunchKernel, kernel, stream);
  return (void)grid, (void)block, (void)arguments, (void)shared, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  ENTER(cudaLaunchKernel, kernel, stream);
  return (void)grid, (void)block, (void)arguments, (void)shared, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  (void)kernel, memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32, attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int block, size_t shared,
                                                                   unsigned flags) {
  return (void)kernel, (void)block, (void)shared, (void)flags, *count = 2, cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit, void **jit_values,
                                unsigned jit_count, enum cudaLibraryOption *options, void **values, unsigned count) {
  (void)code, (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
  return *library = malloc(16), cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
  return (void)library, (void)name, *kernel = malloc(16), cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  (void)version, (void)flags;
  *entry = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
