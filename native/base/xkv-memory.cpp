#include "base/xkv-memory.h"

#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif
#if defined(__GLIBC__)
#    include <malloc.h>
#endif

void xkv_trim() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

void xkv_drop(void * ptr, size_t n_byte) {
#if defined(__linux__)
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) ptr + page - 1) / page * page;
    const uintptr_t end   = ((uintptr_t) ptr + n_byte) / page * page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
#else
    (void) ptr;
    (void) n_byte;
#endif
}

void xkv_ask(size_t n_byte) {
    void * ptr = malloc(n_byte);
    if (!ptr) {
        throw std::bad_alloc();
    }
    free(ptr);
}

void * xkv_pages_new(size_t n_byte) {
#if defined(__unix__) || defined(__APPLE__)
    void * ptr = mmap(nullptr, n_byte, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return ptr == MAP_FAILED ? nullptr : ptr;
#else
    return malloc(n_byte);
#endif
}

void xkv_pages_free(void * ptr, size_t n_byte) {
#if defined(__unix__) || defined(__APPLE__)
    munmap(ptr, n_byte);
#else
    (void) n_byte;
    free(ptr);
#endif
}
