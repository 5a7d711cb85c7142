// A program that takes too long over one input ends, and says which.

#pragma once

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include <unistd.h>

static const unsigned FUZZ_SECONDS = 20; // of an input, in a build with sanitizers beside other work

static volatile unsigned long long g_input = 0;

static inline void fuzz_hangs(int) {
    char      text[64];
    const int n = snprintf(text, sizeof(text), "input %llu takes too long\n", g_input);
    _exit(write(2, text, n) == n ? 2 : 3);
}

static inline void fuzz_begin(unsigned long long i) {
    g_input = i;
    signal(SIGALRM, fuzz_hangs);
    alarm(FUZZ_SECONDS);
}
