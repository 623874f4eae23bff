/* The C interface of a model compiled by luthier: model.so of an artifact, or the library in the compiling process.
 *
 *     lt_context *ctx = lt_create(weights, weights_bytes, 0);
 *     lt_tensor in = {x, sizeof x, LT_F32, 2, {8, 64}}, out = {0};
 *     if (lt_run(ctx, &in, 1, &out, 1)) fprintf(stderr, "%s\n", lt_message(ctx));
 *     ... out.data, out.shape ...
 *     lt_free(out.data);
 *     lt_destroy(ctx);
 *
 * A context serves one call at a time and owns its worker threads and temporaries; several contexts may run at once and share the
 * weights. After fork the child starts its own workers at its first call.
 */
#ifndef LUTHIER_H
#define LUTHIER_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LT_ABI_VERSION 1

/* Element types: the codes of ONNX. Types below 8 bits are packed, first element in the lowest bits. */
enum {
  LT_F32 = 1, LT_U8 = 2, LT_I8 = 3, LT_U16 = 4, LT_I16 = 5, LT_I32 = 6, LT_I64 = 7, LT_BOOL = 9, LT_F16 = 10, LT_F64 = 11,
  LT_U32 = 12, LT_U64 = 13, LT_BF16 = 16, LT_U4 = 21, LT_I4 = 22, LT_F4E2M1 = 23, LT_U2 = 25, LT_I2 = 26
};

/* INPUT: the caller's tensors do not fit, or a shape that the model computes is impossible for them. OUTPUT: an array given for an
 * output is too small. MEMORY: out of memory. INDEX: a kernel of a module compiled with bounds checks met an index out of range.
 * After any of them the context can be used again; the contents of outputs are undefined. */
enum { LT_OK = 0, LT_ERROR_INPUT = 1, LT_ERROR_OUTPUT = 2, LT_ERROR_MEMORY = 3, LT_ERROR_INDEX = 4 };

/* A dense row-major array. Inputs: capacity is not read. Outputs: with data == 0 the library allocates (release with lt_free);
 * otherwise data must hold `capacity` bytes, must not overlap an input, and is written in place. dtype, rank and shape of outputs
 * are set by the library. */
typedef struct {
  void *data;
  int64_t capacity;
  int32_t dtype;
  int32_t rank;
  int64_t shape[8];
} lt_tensor;

typedef struct lt_context lt_context;

/* LT_ABI_VERSION of the library. */
int32_t lt_abi_version(void);

/* `weights`: contents of weights.bin, 64-byte aligned (a mapped file is), alive and unchanged as long as the context.
 * `threads`: at most this many run a call; 0: the processors that this process may use. NULL: out of memory, or wrong weights. */
lt_context *lt_create(const void *weights, int64_t weights_bytes, int32_t threads);
void lt_destroy(lt_context *);

/* Optional inputs (`default` in manifest.json) come last: leave them out of the count, or zero their tensors.
 * LT_OK, or a code whose reason lt_message tells, naming the tensor and the dimension. */
int32_t lt_run(lt_context *, lt_tensor *inputs, int32_t n_inputs, lt_tensor *outputs, int32_t n_outputs);

/* Checks the inputs (their data is not read) and sets dtype, rank and shape of the outputs; a dimension that only the run finds
 * is -1. */
int32_t lt_infer(lt_context *, lt_tensor *inputs, int32_t n_inputs, lt_tensor *outputs, int32_t n_outputs);

/* Why the last call failed. Valid until the next call. */
const char *lt_message(lt_context *);

/* Releases the data of an output that the library allocated. */
void lt_free(void *);

/* Threads that a call uses. */
int32_t lt_threads(lt_context *);

/* Nanoseconds that an idle thread spins before it sleeps; 50000 at first. */
void lt_set_spin(lt_context *, int64_t ns);

/* Two numbers a kernel call of the program, added to by every run: nanoseconds, count. NULL turns timing off. */
void lt_set_profile(lt_context *, int64_t *times);

#ifdef __cplusplus
}
#endif
#endif
