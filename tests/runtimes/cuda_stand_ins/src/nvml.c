/* libnvidia-ml.so.1: what NVML tells of the made device. A function that is not here is missing, as in an old driver. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int device;
enum { NOT_FOUND = 6, NOT_SUPPORTED = 3, THROTTLE_POWER_CAP = 4, THROTTLE_IDLE = 1 };

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return (void)flags, 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code ? "error of the stand-in" : "success"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { return snprintf(text, size, "580.00.00"), 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  *handle = &device; /* the UUID that libcuda.so.1 gives: sixteen bytes of 7 */
  return strcmp(uuid, "GPU-07070707-0707-0707-0707-070707070707") ? NOT_FOUND : 0;
}
int nvmlDeviceGetClockInfo(void *handle, int kind, unsigned *mhz) { return (void)handle, *mhz = kind == 1 ? 1980 : 2619, 0; }
int nvmlDeviceGetMaxClockInfo(void *handle, int kind, unsigned *mhz) { return (void)handle, (void)kind, *mhz = 1980, 0; }
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { return (void)handle, *milliwatts = 123456, 0; }
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) { return (void)handle, (void)milliwatts, NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) { return (void)handle, (void)sensor, *celsius = 41, 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
  return (void)handle, *reasons = THROTTLE_POWER_CAP | THROTTLE_IDLE, 0;
}
