#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

// gives freed memory back to the system, where the C library keeps it
void xkv_trim();

// gives whole pages back to the system; their contents are lost
void xkv_drop(void * ptr, size_t n_byte);

// ggml ends the process where it gets no memory for its own records: throws std::bad_alloc beforehand
void xkv_ask(size_t n_byte);

// whole pages of the system's; nullptr when there are none
void * xkv_pages_new(size_t n_byte);
void   xkv_pages_free(void * ptr, size_t n_byte);

// Memory that goes back to the system when it is freed. The C library would keep it, and what a renewal of bases takes for a moment
// would count for as long as the process lives.
template <typename T> struct xkv_page_allocator {
    using value_type = T;

    xkv_page_allocator() = default;
    template <typename U> xkv_page_allocator(const xkv_page_allocator<U> &) {}

    static constexpr size_t least = 128 * 1024; // bytes; what is smaller comes and goes with every chunk

    T * allocate(size_t n) {
        void * ptr = n * sizeof(T) < least ? malloc(n * sizeof(T)) : xkv_pages_new(n * sizeof(T));
        if (!ptr) {
            throw std::bad_alloc();
        }
        return (T *) ptr;
    }

    void deallocate(T * ptr, size_t n) {
        if (n * sizeof(T) < least) {
            free(ptr);
        } else {
            xkv_pages_free(ptr, n * sizeof(T));
        }
    }

    bool operator==(const xkv_page_allocator &) const { return true; }
    bool operator!=(const xkv_page_allocator &) const { return false; }
};

using xkv_floats = std::vector<float, xkv_page_allocator<float>>;
