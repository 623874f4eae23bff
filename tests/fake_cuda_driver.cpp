// CUDA's driver API as far as cuda_driver.py uses it, over the emulator: an "image" is text, "parameters path of the kernels' library".
// FAKE_CUDA, read at every call, says what goes wrong: "none" (no device), "memory", "image" (no cubin fits), "old" (nor PTX), "launch".
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct Arg { void* p; long long n; };
struct Function { int count; void *call, *bind; };
struct Module { int count; void* lib; };
typedef int (*Launch)(void*, void*, const Arg*, const unsigned*, int, int, char*);
static bool is(const char* what) { const char* e = getenv("FAKE_CUDA"); return e && !strcmp(e, what); }
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* n) { *n = !is("none"); return 0; }
int cuDeviceGet(int* d, int) { *d = 0; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuDeviceGetAttribute(int* v, int a, int) { *v = a == 75 ? 12 : 0; return 0; }
int cuGetErrorString(int e, const char** s) { *s = e == 2 ? "out of memory" : e == 700 ? "an illegal memory access was encountered" : "no kernel image is available"; return 0; }
int cuMemAlloc_v2(uint64_t* p, size_t n) { if (is("memory")) return 2; *p = (uint64_t)aligned_alloc(64, (n + 63) / 64 * 64); return 0; }
int cuMemFree_v2(uint64_t p) { free((void*)p); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) { memcpy((void*)to, from, n); return 0; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t n) { memcpy(to, (void*)from, n); return 0; }
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t n) { memmove((void*)to, (void*)from, n); return 0; }
int cuModuleLoadData(void** m, const void* image) {
    char path[512];
    Module* r = new Module;
    bool ptx = !strncmp((const char*)image, "ptx ", 4);
    if (is("old") || (is("image") && !ptx)) return ptx ? 222 : 209;
    if (sscanf((const char*)image + (ptx ? 4 : 0), "%d %511s", &r->count, path) != 2) return 200;
    r->lib = dlopen(path, RTLD_NOW);
    *m = r;
    return r->lib ? 0 : 200;
}
int cuModuleGetFunction(void** f, void* m, const char* name) {
    char call[512];
    snprintf(call, sizeof call, "call_%s", name);
    *f = new Function{((Module*)m)->count, dlsym(((Module*)m)->lib, call), dlsym(((Module*)m)->lib, "lt_bind")};
    return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z, unsigned, void*, void** params, void**) {
    if (is("launch")) return 700;
    Function* k = (Function*)f;
    Arg args[64];
    unsigned dims[] = {gx, gy, gz, x, y, z};
    char message[512];
    for (int i = 0; i < k->count; i++) memcpy(&args[i].p, params[i], 8), args[i].n = 1ll << 40;
    static Launch launch = (Launch)dlsym(dlopen(getenv("FAKE_CUDA_RUNTIME"), RTLD_NOW), "lt_launch");
    return launch(k->call, k->bind, args, dims, 1, 0, message) ? 719 : 0;
}
int cuCtxSynchronize() { return 0; }
}
