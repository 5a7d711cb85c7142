#include "base/xkv-memory.h"

#if defined(__GLIBC__) || defined(__linux__)
#    include <malloc.h>
#endif

void xkv_trim() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}
