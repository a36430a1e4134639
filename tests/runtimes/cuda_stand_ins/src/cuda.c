/* libcuda.so.1: CUDA's driver for one made device of compute capability 9.0. A function that is not here is answered with
 * "not supported", so that nothing is taken for done that was not. */
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

#define STREAM(stream) ((StandInStream *)(stream))
#define EVENT(event) ((StandInEvent *)(event))

static __thread CUcontext current;
static char primary[64];
static char pool[64];

CUresult cuInit(unsigned flags) {
  CALL(cuInit, flags, 0);
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  const char *pretended = getenv("STAND_IN_DRIVER");
  return *version = pretended ? atoi(pretended) : CUDA_VERSION, CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STAND_IN";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "error of the stand-in";
  return CUDA_SUCCESS;
}

/* -- device and context ------------------------------------------------------------------------------------------ */

CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  return *device = ordinal, ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  return (void)device, snprintf(name, size, "stand-in: no GPU, no kernel runs"), CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { return (void)device, memset(uuid, 7, sizeof *uuid), CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
  size_t available;
  return (void)device, stand_in_memory(&available, bytes), CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return (void)device, *context = (CUcontext)primary, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return (void)device, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) {
  return *device = 0, current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
  return (void)stream, *context = (CUcontext)primary, CUDA_SUCCESS;
}
CUresult cuStreamGetDevice(CUstream stream, CUdevice *device) { return (void)stream, *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, CUDA_SUCCESS; }

/* -- memory ------------------------------------------------------------------------------------------------------ */

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
  CALL(cuMemAlloc, size, 0);
  return (CUresult)stand_in_allocate((void **)pointer, size, STAND_IN_DEVICE);
}
CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t size, CUstream stream) {
  CALL(cuMemAllocAsync, size, stream);
  return (CUresult)stand_in_allocate((void **)pointer, size, STAND_IN_DEVICE);
}
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t size, CUmemoryPool from, CUstream stream) {
  return (void)from, cuMemAllocAsync(pointer, size, stream);
}
CUresult cuMemFree(CUdeviceptr pointer) { return (CUresult)stand_in_free((void *)pointer); }
CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream stream) {
  CALL(cuMemFreeAsync, pointer, stream);
  return (CUresult)stand_in_free((void *)pointer);
}
CUresult cuMemAllocHost(void **pointer, size_t size) {
  CALL(cuMemAllocHost, size, 0);
  return (CUresult)stand_in_allocate(pointer, size, STAND_IN_HOST);
}
CUresult cuMemFreeHost(void *pointer) { return (CUresult)stand_in_free(pointer); }
CUresult cuMemGetInfo(size_t *available, size_t *total) { return stand_in_memory(available, total), CUDA_SUCCESS; }
static CUresult copy(void *to, const void *from, size_t size, CUstream stream) {
  return stand_in_copy(to, from, size, STREAM(stream)), CUDA_SUCCESS;
}
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) { return copy((void *)to, (void *)from, size, NULL); }
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  CALL(cuMemcpyAsync, size, stream);
  return copy((void *)to, (void *)from, size, stream);
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) { return copy((void *)to, from, size, NULL); }
CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) { return copy(to, (void *)from, size, NULL); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  CALL(cuMemcpyHtoDAsync, size, stream);
  if (stand_in_kind((void *)to, NULL, NULL) != STAND_IN_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  return copy((void *)to, from, size, stream);
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  CALL(cuMemcpyDtoHAsync, size, stream);
  if (stand_in_kind((void *)from, NULL, NULL) != STAND_IN_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  return copy(to, (void *)from, size, stream);
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  CALL(cuMemcpyDtoDAsync, size, stream);
  return copy((void *)to, (void *)from, size, stream);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return (void)stream, memset((void *)to, value, count), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  int kind = stand_in_kind((void *)pointer, NULL, NULL);
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      if (!kind) return CUDA_ERROR_INVALID_VALUE;
      *(unsigned *)value = kind == STAND_IN_DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = 0; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = pointer; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = (CUcontext)primary; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; i++) {
    if (cuPointerGetAttribute(values[i], attributes[i], pointer) == CUDA_SUCCESS) continue;
    if (attributes[i] == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)values[i] = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *out, CUdevice device) {
  return (void)device, *out = (CUmemoryPool)pool, CUDA_SUCCESS;
}
CUresult cuDeviceGetMemPool(CUmemoryPool *out, CUdevice device) { return cuDeviceGetDefaultMemPool(out, device); }
CUresult cuMemGetMemPool(CUmemoryPool *out, CUmemLocation *location, CUmemAllocationType type) {
  return (void)location, (void)type, *out = (CUmemoryPool)pool, CUDA_SUCCESS;
}
CUresult cuMemGetDefaultMemPool(CUmemoryPool *out, CUmemLocation *location, CUmemAllocationType type) {
  return cuMemGetMemPool(out, location, type);
}
CUresult cuMemPoolGetAttribute(CUmemoryPool from, CUmemPool_attribute attribute, void *value) {
  return (void)from, (void)attribute, memset(value, 0, attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES ? 4 : 8),
         CUDA_SUCCESS;
}
CUresult cuMemPoolSetAttribute(CUmemoryPool to, CUmemPool_attribute attribute, void *value) {
  CALL(cuMemPoolSetAttribute, attribute, *(cuuint64_t *)value);
  return (void)to, CUDA_SUCCESS;
}

/* -- streams, events, graphs ------------------------------------------------------------------------------------- */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  return (void)flags, *stream = (CUstream)stand_in_stream_new(), CUDA_SUCCESS;
}
CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
  return (void)priority, cuStreamCreate(stream, flags);
}
CUresult cuStreamDestroy(CUstream stream) {
  CALL(cuStreamDestroy, stream, 0);
  return stand_in_stream_free(STREAM(stream)), CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
  CALL(cuStreamSynchronize, stream, 0);
  return (CUresult)stand_in_stream_wait(STREAM(stream));
}
CUresult cuStreamQuery(CUstream stream) { return (void)stream, CUDA_SUCCESS; }
CUresult cuStreamGetFlags(CUstream stream, unsigned *flags) { return (void)stream, *flags = 1, CUDA_SUCCESS; }
CUresult cuStreamGetPriority(CUstream stream, int *priority) { return (void)stream, *priority = 0, CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  CALL(cuStreamWaitEvent, stream, event);
  return (void)flags, CUDA_SUCCESS;
}
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
  CALL(cuLaunchHostFunc, function, data);
  return stand_in_host_function(function, data, STREAM(stream)), CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = (CUstreamCaptureStatus)stand_in_stream_capturing(STREAM(stream)), CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  CALL(cuStreamBeginCapture, stream, mode);
  return (CUresult)stand_in_stream_begin(STREAM(stream));
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  CALL(cuStreamEndCapture, stream, 0);
  return (CUresult)stand_in_stream_end(STREAM(stream), (void **)graph);
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
  CALL(cuGraphInstantiate, graph, flags);
  return *executable = malloc(sizeof(void *)), memcpy(*executable, graph, sizeof(void *)), CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  CALL(cuGraphLaunch, executable, stream);
  return stand_in_launch(executable), CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) { return free(graph), CUDA_SUCCESS; }
CUresult cuGraphExecDestroy(CUgraphExec executable) { return free(executable), CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent *event, unsigned flags) {
  return (void)flags, *event = (CUevent)stand_in_event_new(), CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) { return free(event), CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
  CALL(cuEventRecord, event, stream);
  return stand_in_event_record(EVENT(event), STREAM(stream)), CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent event) { return (void)event, CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent event) {
  CALL(cuEventSynchronize, event, 0);
  return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime(float *ms, CUevent begin, CUevent end) {
  return *ms = stand_in_event_ms(EVENT(begin), EVENT(end)), CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  (void)type, (void)rank, (void)address, (void)sizes, (void)strides, (void)box, (void)element_strides;
  (void)interleave, (void)swizzle, (void)l2, (void)fill;
  return memset(map, 0, sizeof *map), CUDA_SUCCESS;
}

/* -- look-up ----------------------------------------------------------------------------------------------------- */

static CUresult not_here(void) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuGetProcAddress(const char *symbol, void **entry, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *result) {
  static const char *const suffixes[] = {"_v3", "_v2", ""};
  (void)version, (void)flags;
  *entry = NULL;
  for (int i = 0; i < 3 && *entry == NULL; i++) {
    char name[128];
    snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
    *entry = dlsym(RTLD_DEFAULT, name);
  }
  if (*entry == NULL) {
    if (getenv("STAND_IN_VERBOSE")) fprintf(stderr, "stand-in libcuda has no %s\n", symbol);
    *entry = (void *)not_here;
  }
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
