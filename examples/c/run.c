/* Runs a compiled model without Python: fixed inputs (0, 1, 2, ... scaled), a few outputs printed.
 *
 *   cc -O2 -I model.luthier examples/c/run.c -o run -ldl && ./run model.luthier 2x64
 *
 * Arguments: the artifact folder, then one shape for each input (f32, i64 and i32 inputs are filled, others are zero). A shape may
 * name its type: 2x64:i64. Exit code 0 when the model ran.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model.h"

#define MAX_TENSORS 64

static void *lib;

static void *symbol(const char *name) {
  void *p = dlsym(lib, name);
  if (!p) {
    fprintf(stderr, "model.so lacks %s\n", name);
    exit(2);
  }
  return p;
}

static const void *map(const char *path, int64_t *bytes) {
  struct stat st;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &st)) {
    perror(path);
    exit(2);
  }
  *bytes = st.st_size;
  static char empty[64] __attribute__((aligned(64)));
  void *p = st.st_size ? mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : empty;
  close(fd);
  if (p == MAP_FAILED) {
    perror("mmap");
    exit(2);
  }
  return p;
}

/* "2x64:i64" to a filled tensor. */
static lt_tensor input(const char *text) {
  lt_tensor t = {0};
  int64_t n = 1;
  t.dtype = LT_F32;
  if (strstr(text, ":i64")) t.dtype = LT_I64;
  if (strstr(text, ":i32")) t.dtype = LT_I32;
  if (strstr(text, ":bool")) t.dtype = LT_BOOL;
  for (const char *p = text; *p && *p != ':' && t.rank < 8;) {
    char *end;
    t.shape[t.rank] = strtoll(p, &end, 10);
    if (end == p) break;
    n *= t.shape[t.rank++];
    p = *end == 'x' ? end + 1 : end;
  }
  int64_t size = t.dtype == LT_I64 ? 8 : t.dtype == LT_BOOL ? 1 : 4;
  t.capacity = n * size;
  t.data = calloc(n ? n : 1, size);
  if (!t.data) exit(2);
  for (int64_t i = 0; i < n; i++) {
    if (t.dtype == LT_F32) ((float *)t.data)[i] = (float)(i % 17) / 17.0f - 0.5f;
    if (t.dtype == LT_I64) ((int64_t *)t.data)[i] = i % 2;
    if (t.dtype == LT_I32) ((int32_t *)t.data)[i] = (int32_t)(i % 2);
  }
  return t;
}

int main(int argc, char **argv) {
  char path[4096];
  lt_tensor in[MAX_TENSORS], out[MAX_TENSORS];
  int n_in = argc - 2, n_out = 1;
  if (argc < 2 || n_in > MAX_TENSORS) {
    fprintf(stderr, "usage: %s ARTIFACT [SHAPE[:TYPE]]... (LT_OUTPUTS=count of outputs, default 1)\n", argv[0]);
    return 2;
  }
  if (getenv("LT_OUTPUTS")) n_out = atoi(getenv("LT_OUTPUTS"));
  if (n_out < 0 || n_out > MAX_TENSORS) return 2;
  snprintf(path, sizeof path, "%s/model.so", argv[1]);
  lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!lib) {
    fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  int32_t (*abi)(void) = (int32_t(*)(void))symbol("lt_abi_version");
  lt_context *(*create)(const void *, int64_t, int32_t) = (lt_context * (*)(const void *, int64_t, int32_t)) symbol("lt_create");
  void (*destroy)(lt_context *) = (void (*)(lt_context *))symbol("lt_destroy");
  int32_t (*run)(lt_context *, lt_tensor *, int32_t, lt_tensor *, int32_t) =
      (int32_t(*)(lt_context *, lt_tensor *, int32_t, lt_tensor *, int32_t))symbol("lt_run");
  const char *(*message)(lt_context *) = (const char *(*)(lt_context *))symbol("lt_message");
  void (*release)(void *) = (void (*)(void *))symbol("lt_free");
  if (abi() != LT_ABI_VERSION) {
    fprintf(stderr, "model.so has ABI version %d, this program was built for %d\n", abi(), LT_ABI_VERSION);
    return 2;
  }
  int64_t bytes;
  snprintf(path, sizeof path, "%s/weights.bin", argv[1]);
  const void *weights = map(path, &bytes);
  lt_context *ctx = create(weights, bytes, 0);
  if (!ctx) {
    fprintf(stderr, "cannot create a context: wrong weights.bin or no memory\n");
    return 2;
  }
  for (int i = 0; i < n_in; i++) in[i] = input(argv[2 + i]);
  memset(out, 0, sizeof out);
  if (run(ctx, in, n_in, out, n_out)) {
    fprintf(stderr, "%s\n", message(ctx));
    return 1;
  }
  for (int j = 0; j < n_out; j++) {
    int64_t n = 1;
    printf("output %d: dtype %d [", j, out[j].dtype);
    for (int k = 0; k < out[j].rank; k++) {
      n *= out[j].shape[k];
      printf("%s%" PRId64, k ? ", " : "", out[j].shape[k]);
    }
    printf("]");
    for (int64_t i = 0; i < n && i < 8; i++) {
      if (out[j].dtype == LT_F32) printf(" %.6g", ((float *)out[j].data)[i]);
      if (out[j].dtype == LT_I64) printf(" %" PRId64, ((int64_t *)out[j].data)[i]);
    }
    printf("\n");
    release(out[j].data);
  }
  for (int i = 0; i < n_in; i++) free(in[i].data);
  destroy(ctx);
  dlclose(lib);
  return 0;
}
