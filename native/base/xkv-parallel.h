#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

// Runs f(0) .. f(n - 1) on up to n_threads threads of the host; the first exception is thrown again.
template <typename F> void xkv_parallel(size_t n, int n_threads, F && f) {
    std::atomic<size_t> next{ 0 };
    std::exception_ptr  error;
    std::mutex          mutex;

    const auto work = [&] {
        for (size_t i = next++; i < n; i = next++) {
            try {
                f(i);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex);
                error = error ? error : std::current_exception();
            }
        }
    };
    std::vector<std::thread> threads;
    try {
        for (size_t i = 1; i < n && (int) i < n_threads; ++i) {
            threads.emplace_back(work);
        }
    } catch (...) {
        // the system has no more threads, or no memory for one: those that run do all the work
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
    if (error) {
        std::rethrow_exception(error);
    }
}
