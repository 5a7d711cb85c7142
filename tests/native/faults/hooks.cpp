// Functions of the C library, in front of the library's own: a program's symbols come first in all that it loads.

#include "hooks.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <algorithm>
#include <atomic>
#include <iterator>

#include <dlfcn.h>
#include <execinfo.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

extern "C" {
void * __libc_malloc(size_t size);
void * __libc_calloc(size_t n, size_t size);
void * __libc_realloc(void * ptr, size_t size);
void * __libc_memalign(size_t align, size_t size);
void   __libc_free(void * ptr);
}

static std::atomic<bool>     g_armed{ false };
static std::atomic<int>      g_kind{ 0 };
static std::atomic<uint64_t> g_nth{ 0 };
static std::atomic<uint64_t> g_count{ 0 };
static std::atomic<bool>     g_of_upstream{ false };
static std::atomic<int64_t>  g_live{ 0 };

static thread_local bool g_looking = false; // inside a hook, whose own calls do not count

// whether a call comes from ggml, or from the OpenMP that it computes with, or from a constructor of llama.cpp's own, rather than from us
static bool from_upstream() {
    void *    frames[32];
    const int n = backtrace(frames, 32);
    for (int i = 0; i < n; ++i) {
        Dl_info info;
        if (!dladdr(frames[i], &info) || !info.dli_fname) {
            continue;
        }
        // templates of the language are in whichever library was loaded first
        static const char * const language[] = { "_ZNSt", "_ZNKSt", "_ZSt", "_ZN9__gnu_cxx" };
        if (info.dli_sname && std::any_of(std::begin(language), std::end(language),
                                          [&](const char * begin) { return strncmp(info.dli_sname, begin, strlen(begin)) == 0; })) {
            continue;
        }
        // constructors that keep what they made by hand
        if (info.dli_sname &&
            (strncmp(info.dli_sname, "_ZN14llama_kv_cacheC", 20) == 0 || strncmp(info.dli_sname, "_ZN13llama_contextC", 19) == 0)) {
            return true;
        }
        const char * slash = strrchr(info.dli_fname, '/');
        const char * name  = slash ? slash + 1 : info.dli_fname;
        if (strncmp(name, "libggml", 7) == 0 || strncmp(name, "libgomp", 7) == 0) {
            return true;
        }
        if (strncmp(name, "libllama", 8) == 0) {
            return false;
        }
    }
    return false;
}

static bool fails(fault_kind kind) {
    if (!g_armed || g_kind != kind || g_looking || ++g_count != g_nth) {
        return false;
    }
    g_looking     = true;
    g_of_upstream = from_upstream();
    g_looking     = false;
    return true;
}

void fault_arm(fault_kind kind, uint64_t n) {
    void * frames[4];
    backtrace(frames, 4); // its first call allocates
    g_kind        = kind;
    g_nth         = n;
    g_count       = 0;
    g_of_upstream = false;
    g_armed       = true;
}

uint64_t fault_disarm() {
    g_armed = false;
    return g_count;
}

bool fault_was_of_upstream() {
    return g_of_upstream;
}

int64_t fault_live_bytes() {
    return g_live;
}

static void * taken(void * ptr) {
    g_live += ptr ? (int64_t) malloc_usable_size(ptr) : 0;
    return ptr;
}

static void * refused() {
    errno = ENOMEM;
    return nullptr;
}

template <typename F> static F next(F, const char * name) {
    return (F) dlsym(RTLD_NEXT, name);
}

extern "C" {

void * malloc(size_t size) {
    return fails(FAULT_MEMORY) ? refused() : taken(__libc_malloc(size));
}

void * calloc(size_t n, size_t size) {
    return fails(FAULT_MEMORY) ? refused() : taken(__libc_calloc(n, size));
}

void * realloc(void * ptr, size_t size) {
    if (fails(FAULT_MEMORY)) {
        return refused();
    }
    const int64_t before = ptr ? (int64_t) malloc_usable_size(ptr) : 0;
    void *        res    = __libc_realloc(ptr, size);
    if (res || size == 0) {
        g_live -= before;
    }
    return taken(res);
}

void * memalign(size_t align, size_t size) {
    return fails(FAULT_MEMORY) ? refused() : taken(__libc_memalign(align, size));
}

void * aligned_alloc(size_t align, size_t size) {
    return memalign(align, size);
}

int posix_memalign(void ** ptr, size_t align, size_t size) {
    void * res = memalign(align, size);
    *ptr       = res ? res : *ptr;
    return res ? 0 : ENOMEM;
}

void free(void * ptr) {
    g_live -= ptr ? (int64_t) malloc_usable_size(ptr) : 0;
    __libc_free(ptr);
}

void * mmap(void * addr, size_t size, int prot, int flags, int fd, off_t offset) noexcept {
    static const auto real = next(&mmap, "mmap");
    if (fails(FAULT_MEMORY)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return real(addr, size, prot, flags, fd, offset);
}

int pthread_create(pthread_t * thread, const pthread_attr_t * attr, void * (*run)(void *), void * arg) noexcept {
    static const auto real = next(&pthread_create, "pthread_create");
    Dl_info           info;
    const bool        gomp = dladdr(__builtin_return_address(0), &info) && info.dli_fname && strstr(info.dli_fname, "libgomp");
    return !gomp && fails(FAULT_THREAD) ? EAGAIN : real(thread, attr, run, arg);
}

FILE * fopen(const char * path, const char * mode) {
    static const auto real = next(&fopen, "fopen");
    if (fails(FAULT_FILE)) {
        errno = EIO;
        return nullptr;
    }
    return real(path, mode);
}

size_t fread(void * ptr, size_t size, size_t n, FILE * file) {
    static const auto real = next(&fread, "fread");
    if (fails(FAULT_FILE)) {
        errno = EIO;
        return 0;
    }
    return real(ptr, size, n, file);
}

int fseek(FILE * file, long offset, int whence) {
    static const auto real = next(&fseek, "fseek");
    if (fails(FAULT_FILE)) {
        errno = EIO;
        return -1;
    }
    return real(file, offset, whence);
}

int fstat(int fd, struct stat * st) noexcept {
    static const auto real = next(&fstat, "fstat");
    if (fails(FAULT_FILE)) {
        errno = EIO;
        return -1;
    }
    return real(fd, st);
}

} // extern "C"
