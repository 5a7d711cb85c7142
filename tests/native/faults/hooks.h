// Calls that fail once: memory, threads and files of the whole process, counted while they are armed.

#pragma once

#include <cstddef>
#include <cstdint>

enum fault_kind {
    FAULT_MEMORY, // malloc and its kin, operator new, mmap
    FAULT_THREAD, // pthread_create, but for OpenMP's, whose library ends the process
    FAULT_FILE,   // fopen, fseek, fread, fstat
    FAULT_KINDS,
};

// the n-th call of the kind from now on fails, none with 0; calls are counted anew
void fault_arm(fault_kind kind, uint64_t n);

// returns the calls that were counted
uint64_t fault_disarm();

// whether the call that failed was one of ggml's own or of its OpenMP, which take no failure for an answer
bool fault_was_of_upstream();

// bytes that are allocated now
int64_t fault_live_bytes();
