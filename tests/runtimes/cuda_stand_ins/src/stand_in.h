/* What the stand-in libraries share. The state lives in libcuda.so.1, which all others are linked to. */
#ifndef STAND_IN_H
#define STAND_IN_H
#include <stddef.h>
#include <stdint.h>

/* Notes a call with two of its arguments; returns the error that a test asked this call to give, else 0. */
int stand_in_call(const char *name, intptr_t first, intptr_t second);

/* Controls for tests. The call number `skip` (from 0, counted from now) of `name` returns `code`, once. */
void stand_in_fail(const char *name, int skip, int code);
/* Lines `name first second`, in the order of the calls since the last reset; returns the length written. */
size_t stand_in_trace(char *text, size_t size);
size_t stand_in_trace_size(void);
void stand_in_reset(void);
void stand_in_memory_limit(size_t bytes);
int stand_in_device_arrays(void); /* allocations alive in GPU memory */

enum { STAND_IN_SUCCESS = 0, STAND_IN_INVALID = 1, STAND_IN_OUT_OF_MEMORY = 2, STAND_IN_CAPTURE = 900 };
enum { STAND_IN_HOST = 1, STAND_IN_DEVICE = 2 };

/* Device memory is host memory, counted against the limit. */
int stand_in_allocate(void **pointer, size_t size, int kind);
int stand_in_free(void *pointer);
int stand_in_kind(const void *pointer, void **start, size_t *size); /* 0 for memory that is not ours */
void stand_in_memory(size_t *available, size_t *total);

typedef struct StandInStream StandInStream;
typedef struct StandInEvent StandInEvent;
StandInStream *stand_in_stream_new(void);
void stand_in_stream_free(StandInStream *stream);
int stand_in_stream_begin(StandInStream *stream);
int stand_in_stream_end(StandInStream *stream, void **graph);
void stand_in_copy(void *to, const void *from, size_t size, StandInStream *stream);
void stand_in_host_function(void (*function)(void *), void *data, StandInStream *stream);
void stand_in_launch(void *graph);
int stand_in_stream_capturing(StandInStream *stream);
int stand_in_stream_wait(StandInStream *stream); /* a wait of the host: an error on a capturing stream */
int stand_in_any_capture(void);
void stand_in_break_capture(void);
StandInEvent *stand_in_event_new(void);
void stand_in_event_record(StandInEvent *event, StandInStream *stream);
float stand_in_event_ms(StandInEvent *begin, StandInEvent *end);

#define CALL(name, first, second)                                                                     \
  do {                                                                                                \
    int stand_in_error = stand_in_call(#name, (intptr_t)(first), (intptr_t)(second));                 \
    if (stand_in_error) return stand_in_error;                                                        \
  } while (0)

#endif
