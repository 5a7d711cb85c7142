// Checks in processes of their own: several at a time, and what a fault destroys stays there.

#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

static int n_pass = 0;
static int n_fail = 0;

static void note(bool ok, const std::string & what) {
    (ok ? n_pass : n_fail)++;
    if (!ok || getenv("XKV_TEST_VERBOSE")) {
        printf("%s %s\n", ok ? "ok" : "FAIL", what.c_str());
        fflush(stdout);
    }
}

// what a process of its own returns, or how it ended
static std::string apart(const std::function<std::string()> & f) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends) != 0) {
        return "";
    }
    const pid_t child = fork();
    if (child == 0) {
        const std::string found   = f();
        const bool        written = write(ends[1], found.data(), found.size()) == (ssize_t) found.size();
        _exit(written ? 0 : 1);
    }
    close(ends[1]);
    std::string res;
    char        text[256];
    for (ssize_t n; (n = read(ends[0], text, sizeof(text))) > 0;) {
        res.append(text, n);
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? "the process ended" : res;
}

// f(i) of all, every n_worker-th in a process of its own, for as many as there are processors
static void in_parallel(size_t n, const std::function<void(size_t)> & f) {
    const size_t             n_worker = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> workers;
    std::vector<std::string> results(n_worker);
    for (size_t w = 0; w < n_worker; ++w) {
        workers.emplace_back([&, w] {
            results[w] = apart([&] {
                n_pass = n_fail = 0;
                for (size_t i = w; i < n; i += n_worker) {
                    f(i);
                }
                fflush(stdout);
                return std::to_string(n_pass) + " " + std::to_string(n_fail);
            });
        });
    }
    for (size_t w = 0; w < n_worker; ++w) {
        int passed = 0;
        int failed = 0;
        workers[w].join();
        if (sscanf(results[w].c_str(), "%d %d", &passed, &failed) != 2) {
            note(false, "a process of the test: " + results[w]);
        }
        n_pass += passed;
        n_fail += failed;
    }
}
