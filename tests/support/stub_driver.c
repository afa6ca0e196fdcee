/* A CUDA driver for machines without a GPU: it loads kernels as PTX, runs none of them, and keeps what each launch was given.

   It exports what Triton calls, and `stub_*` for tests/support/stub_driver.py. Memory is the host's: a device pointer is
   the pointer itself. What a real driver would refuse in a launch is refused here too. */

#include <ctype.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define DEVICES 8
#define MOST_PARAMETERS 1024
#define MAGIC 0x5713B0B5u
#define SHARED_MEMORY (227 << 10)

typedef struct {
  char *text;
  unsigned magic;
} Module;

typedef struct {
  unsigned magic, count, threads, shared;
  unsigned sizes[MOST_PARAMETERS];
  char name[256];
} Function;

typedef struct {
  Function *function;
  uint64_t stream;
  unsigned grid[3], block[3], shared, device;
  uint64_t begin, size;
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int major = 9, minor = 0, recording = 1;
static Launch *launches;
static unsigned char *bytes;
static size_t launch_count, launch_room, bytes_used, bytes_room;
static uint64_t modules_loaded, launches_made;
static _Thread_local CUcontext current;

/* -- what Python asks -------------------------------------------------------------------------------------------------- */

void stub_set(int capability_major, int capability_minor, int record) {
  major = capability_major;
  minor = capability_minor;
  recording = record;
}

uint64_t stub_modules(void) { return modules_loaded; }
uint64_t stub_launches_made(void) { return launches_made; }
uint64_t stub_count(void) { return launch_count; }
const Launch *stub_launch(uint64_t index) { return index < launch_count ? launches + index : NULL; }
const unsigned char *stub_bytes(uint64_t begin) { return bytes + begin; }
const char *stub_name(const Function *function) { return function->name; }
unsigned stub_parameters(const Function *function) { return function->count; }
const unsigned *stub_sizes(const Function *function) { return function->sizes; }

void stub_clear(void) {
  pthread_mutex_lock(&lock);
  launch_count = bytes_used = 0;
  pthread_mutex_unlock(&lock);
}

/* -- devices and contexts ---------------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = DEVICES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= DEVICES)
    return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  snprintf(name, size, "stub %d", device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= DEVICES)
    return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_MEMORY; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_MEMORY + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(uintptr_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  *device = (CUdevice)(uintptr_t)current - 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamSynchronize(CUstream stream) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  static _Thread_local CUstreamCaptureMode own = CU_STREAM_CAPTURE_MODE_GLOBAL;
  CUstreamCaptureMode before = own;
  own = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  static const char *const other = "the stub driver says no";
  *text = error == CUDA_SUCCESS                 ? "no error"
          : error == CUDA_ERROR_INVALID_VALUE   ? "invalid argument"
          : error == CUDA_ERROR_INVALID_IMAGE   ? "device kernel image is invalid"
          : error == CUDA_ERROR_INVALID_HANDLE  ? "invalid resource handle"
          : error == CUDA_ERROR_NOT_FOUND       ? "named symbol not found"
          : error == CUDA_ERROR_INVALID_CONTEXT ? "invalid device context"
                                                : other;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !pointer)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* -- kernels ----------------------------------------------------------------------------------------------------------- */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const char *text = image;
  /* PTX, which real drivers take too, and no machine code: its parameters are then there to be read. */
  if (text[0] == 0x7f || !strstr(text, ".version") || !current)
    return current ? CUDA_ERROR_INVALID_IMAGE : CUDA_ERROR_INVALID_CONTEXT;
  Module *made = malloc(sizeof *made);
  made->magic = MAGIC;
  made->text = strdup(text);
  __atomic_add_fetch(&modules_loaded, 1, __ATOMIC_RELAXED);
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  /* Its text stays: what was launched from it may still be asked for. */
  return ((Module *)module)->magic == MAGIC ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* Bytes of one `.param`: `.b64 name`, `.u64 .ptr .global .align 1 name`, `.align 64 .b8 name[128]`. */
static unsigned size_of(const char *begin, const char *end) {
  unsigned width = 0, times = 1;
  for (const char *at = begin; at < end; at++) {
    if (*at == '.' && strchr("busf", at[1]) && at[1] && isdigit((unsigned char)at[2]))
      width = (unsigned)atoi(at + 2) / 8;
    if (*at == '[')
      times = (unsigned)atoi(at + 1);
  }
  return width * times;
}

static unsigned number_after(const char *text, const char *word) {
  const char *at = strstr(text, word);
  return at ? (unsigned)atoi(at + strlen(word)) : 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  char entry[300];
  snprintf(entry, sizeof entry, ".entry %s(", name);
  const char *text = ((Module *)module)->text, *at = strstr(text, entry);
  if (!at)
    return CUDA_ERROR_NOT_FOUND;
  at += strlen(entry);
  const char *close = strchr(at, ')');
  Function *made = calloc(1, sizeof *made);
  made->magic = MAGIC;
  snprintf(made->name, sizeof made->name, "%s", name);
  made->threads = number_after(close, ".reqntid ");
  while ((at = strstr(at, ".param")) && at < close && made->count < MOST_PARAMETERS) {
    const char *end = at;
    while (end < close && *end != ',')
      end++;
    made->sizes[made->count++] = size_of(at + strlen(".param"), end);
    at = end;
  }
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    ((Function *)function)->shared = (unsigned)value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}

static void *grown(void *old, size_t *room, size_t needed, size_t each) {
  if (needed <= *room)
    return old;
  *room = 2 * needed + 1024;
  return realloc(old, *room * each);
}

static void keep(const Launch *launch, void **arguments) {
  const Function *function = launch->function;
  pthread_mutex_lock(&lock);
  size_t size = 0;
  for (unsigned i = 0; i < function->count; i++)
    size += function->sizes[i];
  bytes = grown(bytes, &bytes_room, bytes_used + size, 1);
  launches = grown(launches, &launch_room, launch_count + 1, sizeof *launches);
  Launch *kept = launches + launch_count++;
  *kept = *launch;
  kept->begin = bytes_used;
  kept->size = size;
  for (unsigned i = 0; i < function->count; bytes_used += function->sizes[i++])
    memcpy(bytes + bytes_used, arguments[i], function->sizes[i]);
  pthread_mutex_unlock(&lock);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **arguments, void **extra) {
  Function *function = (Function *)kernel;
  if (!function || function->magic != MAGIC)
    return CUDA_ERROR_INVALID_HANDLE;
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  unsigned most = function->shared > (48u << 10) ? function->shared : 48u << 10;
  if (!config->gridDimX || config->gridDimX > 0x7fffffffu || !config->gridDimY || config->gridDimY > 65535 ||
      !config->gridDimZ || config->gridDimZ > 65535 || !threads || threads > 1024 || config->sharedMemBytes > most ||
      (function->threads && threads != function->threads))
    return CUDA_ERROR_INVALID_VALUE;
  __atomic_add_fetch(&launches_made, 1, __ATOMIC_RELAXED);
  if (!recording)
    return CUDA_SUCCESS;
  Launch launch = {
      .function = function,
      .stream = (uint64_t)(uintptr_t)config->hStream,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared = config->sharedMemBytes,
      .device = (unsigned)(uintptr_t)current - 1,
  };
  keep(&launch, arguments);
  return CUDA_SUCCESS;
}
