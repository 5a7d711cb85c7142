// What upstream's test-llama-archs.cpp uses of its logger, so that it builds without upstream's common library.

#pragma once

#include <cstdio>

enum { LOG_LEVEL_ERROR = 2, LOG_LEVEL_DEBUG = 5 };

#define LOG(...)     printf(__VA_ARGS__)
#define LOG_INF(...) printf(__VA_ARGS__)
#define LOG_ERR(...) fprintf(stderr, __VA_ARGS__)

static inline void common_log_set_verbosity_thold(int) {}

static inline int common_log_get_verbosity(int level) {
    return level;
}

static inline void * common_log_main() {
    return nullptr;
}

static inline void common_log_flush(void *) {}
