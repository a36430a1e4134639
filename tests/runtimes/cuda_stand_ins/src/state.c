/* Calls, memory, streams and events of a GPU that is not there. Part of libcuda.so.1. */
#include "stand_in.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* -- calls ------------------------------------------------------------------------------------------------------- */

static char *trace;
static size_t trace_size, trace_room;
static struct Fault {
  char name[64];
  int skip, code;
} faults[32];
static int fault_count;

static void append(const char *line) {
  size_t length = strlen(line);
  if (trace_size + length + 1 > trace_room) {
    trace_room = 2 * (trace_size + length + 1) + 65536;
    trace = realloc(trace, trace_room);
  }
  memcpy(trace + trace_size, line, length + 1);
  trace_size += length;
}

int stand_in_call(const char *name, intptr_t first, intptr_t second) {
  char line[160];
  int code = 0;
  snprintf(line, sizeof line, "%s %lld %lld\n", name, (long long)first, (long long)second);
  pthread_mutex_lock(&mutex);
  if (trace_size < ((size_t)64 << 20)) append(line);
  for (int i = 0; i < fault_count; i++) {
    if (strcmp(faults[i].name, name) != 0) continue;
    if (faults[i].skip-- > 0) break;
    code = faults[i].code;
    faults[i] = faults[--fault_count];
    break;
  }
  pthread_mutex_unlock(&mutex);
  return code;
}

void stand_in_fail(const char *name, int skip, int code) {
  pthread_mutex_lock(&mutex);
  if (fault_count < (int)(sizeof faults / sizeof faults[0])) {
    snprintf(faults[fault_count].name, sizeof faults[0].name, "%s", name);
    faults[fault_count].skip = skip;
    faults[fault_count++].code = code;
  }
  pthread_mutex_unlock(&mutex);
}

size_t stand_in_trace_size(void) { return trace_size; }

size_t stand_in_trace(char *text, size_t size) {
  pthread_mutex_lock(&mutex);
  size_t length = trace_size < size ? trace_size : size;
  if (length) memcpy(text, trace, length);
  pthread_mutex_unlock(&mutex);
  return length;
}

void stand_in_reset(void) {
  pthread_mutex_lock(&mutex);
  trace_size = 0;
  fault_count = 0;
  pthread_mutex_unlock(&mutex);
}

/* -- memory ------------------------------------------------------------------------------------------------------ */

typedef struct Block {
  char *start;
  size_t size;
  int kind;
  struct Block *next;
} Block;
static Block *blocks;
static Block *spare; /* small arrays that were given back: the next one of their size lies there, as in CUDA's pools */
static size_t used, limit = (size_t)8 << 30;
enum { SPARE_AT_MOST = 1 << 20 };

static Block *taken_again(size_t size) {
  for (Block **link = &spare; *link; link = &(*link)->next) {
    Block *block = *link;
    if (block->size != size) continue;
    *link = block->next;
    return block;
  }
  return NULL;
}

void stand_in_memory_limit(size_t bytes) { limit = bytes; }

int stand_in_allocate(void **pointer, size_t size, int kind) {
  if (kind == STAND_IN_DEVICE && stand_in_any_capture()) {
    stand_in_break_capture();
    return STAND_IN_CAPTURE;
  }
  pthread_mutex_lock(&mutex);
  int full = kind == STAND_IN_DEVICE && used + size > limit;
  void *memory = NULL;
  Block *block = full || kind != STAND_IN_DEVICE ? NULL : taken_again(size);
  if (!full && !block && posix_memalign(&memory, 512, size ? size : 1) != 0) full = 1;
  if (!full) {
    if (!block) {
      block = malloc(sizeof *block);
      block->start = memory;
    }
    *block = (Block){block->start, size, kind, blocks};
    blocks = block;
    if (kind == STAND_IN_DEVICE) used += size;
    *pointer = block->start;
  }
  pthread_mutex_unlock(&mutex);
  return full ? STAND_IN_OUT_OF_MEMORY : STAND_IN_SUCCESS;
}

int stand_in_free(void *pointer) {
  if (pointer == NULL) return STAND_IN_SUCCESS;
  int status = STAND_IN_INVALID;
  pthread_mutex_lock(&mutex);
  for (Block **link = &blocks; *link; link = &(*link)->next) {
    Block *block = *link;
    if (block->start != pointer) continue;
    if (block->kind == STAND_IN_DEVICE) used -= block->size;
    *link = block->next;
    if (block->kind == STAND_IN_DEVICE && block->size <= SPARE_AT_MOST) {
      block->next = spare;
      spare = block;
    } else {
      free(block->start);
      free(block);
    }
    status = STAND_IN_SUCCESS;
    break;
  }
  pthread_mutex_unlock(&mutex);
  return status;
}

int stand_in_kind(const void *pointer, void **start, size_t *size) {
  int kind = 0;
  pthread_mutex_lock(&mutex);
  for (Block *block = blocks; block; block = block->next) {
    if ((const char *)pointer < block->start || (const char *)pointer >= block->start + (block->size ? block->size : 1))
      continue;
    kind = block->kind;
    if (start) *start = block->start;
    if (size) *size = block->size;
    break;
  }
  pthread_mutex_unlock(&mutex);
  return kind;
}

void stand_in_memory(size_t *available, size_t *total) {
  *available = used < limit ? limit - used : 0;
  *total = limit;
}

int stand_in_device_arrays(void) {
  int count = 0;
  pthread_mutex_lock(&mutex);
  for (Block *block = blocks; block; block = block->next) count += block->kind == STAND_IN_DEVICE;
  pthread_mutex_unlock(&mutex);
  return count;
}

/* -- streams and events ------------------------------------------------------------------------------------------ */

typedef struct Work { /* a copy, or a function of the host that is given `to` */
  void *to;
  const void *from;
  size_t size;
  void (*function)(void *);
  struct Work *next;
} Work;
struct StandInStream {
  int capturing; /* 1 while a graph is captured, 2 when a forbidden call broke it */
  Work *first, *last;
};
struct StandInEvent {
  struct timespec time;
};
static StandInStream default_stream;
static StandInStream *capture; /* one at a time is enough here */

static StandInStream *real(StandInStream *stream) { return (uintptr_t)stream < 16 ? &default_stream : stream; }

StandInStream *stand_in_stream_new(void) { return calloc(1, sizeof(StandInStream)); }

void stand_in_stream_free(StandInStream *stream) {
  if (capture == stream) capture = NULL;
  if ((uintptr_t)stream >= 16) free(stream);
}

int stand_in_any_capture(void) { return capture != NULL; }

void stand_in_break_capture(void) {
  if (capture) capture->capturing = 2;
}

int stand_in_stream_begin(StandInStream *stream) {
  if (capture != NULL || real(stream) == &default_stream) return STAND_IN_CAPTURE;
  capture = stream;
  capture->capturing = 1;
  return STAND_IN_SUCCESS;
}

int stand_in_stream_end(StandInStream *stream, void **graph) {
  int state = real(stream)->capturing;
  *graph = NULL;
  if (!state) return STAND_IN_INVALID;
  Work *work = real(stream)->first;
  *real(stream) = (StandInStream){0, NULL, NULL};
  capture = NULL;
  if (state == 2) return STAND_IN_CAPTURE + 1; /* the capture was invalidated */
  *graph = malloc(sizeof work);
  memcpy(*graph, &work, sizeof work);
  return STAND_IN_SUCCESS;
}

static void done(const Work *work) {
  if (work->function)
    work->function(work->to);
  else
    memmove(work->to, work->from, work->size);
}

/* A graph is a list of work: what is captured is done by each launch, and not by the capture. Graphs are never freed,
 * since instances share their list. */
static void queue(Work work, StandInStream *stream) {
  if (!stream->capturing) {
    done(&work);
    return;
  }
  Work *kept = malloc(sizeof *kept);
  *kept = work;
  if (stream->last) stream->last->next = kept;
  if (!stream->first) stream->first = kept;
  stream->last = kept;
}

void stand_in_copy(void *to, const void *from, size_t size, StandInStream *stream) {
  queue((Work){to, from, size, NULL, NULL}, real(stream));
}

void stand_in_host_function(void (*function)(void *), void *data, StandInStream *stream) {
  queue((Work){data, NULL, 0, function, NULL}, real(stream));
}

void stand_in_launch(void *graph) {
  Work *first;
  memcpy(&first, graph, sizeof first);
  for (Work *work = first; work; work = work->next) done(work);
}

int stand_in_stream_capturing(StandInStream *stream) { return real(stream)->capturing; }

int stand_in_stream_wait(StandInStream *stream) {
  if (!real(stream)->capturing) return STAND_IN_SUCCESS;
  stand_in_break_capture();
  return STAND_IN_CAPTURE;
}

StandInEvent *stand_in_event_new(void) { return calloc(1, sizeof(StandInEvent)); }

void stand_in_event_record(StandInEvent *event, StandInStream *stream) {
  (void)stream;
  clock_gettime(CLOCK_MONOTONIC, &event->time);
}

float stand_in_event_ms(StandInEvent *begin, StandInEvent *end) {
  return (float)((end->time.tv_sec - begin->time.tv_sec) * 1e3 + (end->time.tv_nsec - begin->time.tv_nsec) / 1e6);
}
