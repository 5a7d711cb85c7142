// Every call for memory, a thread or a file fails once, while a context is opened, decodes, is cut, cleared, saved and loaded. The
// operation fails with an error or succeeds; the context goes on after clearing, says before whether it has to be cleared, and
// nothing is left when it is freed. Each trial is a process, so that one that ends is told.
// Arguments: a model, a sidecar, a folder for a state, the most trials of an operation and kind (0: all).

#include "hooks.h"
#include "scenes.h"

#include "xkv.h"

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/wait.h>
#include <unistd.h>

static const int32_t N_NEXT  = 64; // tokens of a batch that is decoded
static const int64_t N_SLACK = 64; // bytes: what the C library keeps of one call and not of another

enum outcome : int {
    WENT_ON,     // the call's failure was taken
    FAILED,      // an error, and the context goes on
    BROKEN,      // an error, and the context says that it has to be cleared
    NOT_OPENED,  // an error where a context was to be made
    OF_UPSTREAM, // the process ended in ggml, which takes no failure for an answer
    WRONG,
    N_OUTCOME,
};

struct report {
    outcome  what;
    uint64_t n_call;
    int64_t  left;        // bytes beside those before
    bool     of_upstream; // the call that failed
    char     text[256];
};

struct trial {
    const scenes &             all;
    const scene &              what;
    const std::vector<float> & expected; // logits of the prompt

    // in a process of its own, whose context is ctx
    report run(llama_context * ctx, fault_kind kind, uint64_t n) const {
        report res = { WRONG, 0, 0, false, "" };
        if (ctx) {
            llama_set_n_threads(ctx, 1, what.n_thread);
        }
        const bool    opens  = ctx == nullptr;
        auto *        next   = all.batch(ctx, what.n_token, N_NEXT);
        const int64_t before = fault_live_bytes();
        fault_arm(kind, n);
        const bool ok   = what.act(all, ctx, next);
        res.n_call      = fault_disarm();
        res.of_upstream = fault_was_of_upstream();
        if (next) {
            llama_batch_ext_free(next);
        }
        if (!ok && n == 0) {
            snprintf(res.text, sizeof(res.text), "fails by itself: %.200s", xkv_last_error());
            return res;
        }
        res.what = ok ? WENT_ON : FAILED;
        if (ctx) {
            go_on(ctx, ok, res);
            llama_free(ctx);
        } else {
            res.what = NOT_OPENED;
        }
        res.left = fault_live_bytes() - (opens ? before : 0);
        return res;
    }

    // the context is cleared, and is as a new one
    void go_on(llama_context * ctx, bool ok, report & res) const {
        const auto wrong = [&](const char * text) {
            res.what = WRONG;
            snprintf(res.text, sizeof(res.text), "%s; %.180s", text, xkv_last_error());
        };
        llama_memory_t mem = llama_get_memory(ctx);
        llama_set_n_threads(ctx, 1, 1);
        const bool told   = xkv_context_refusal(ctx) != XKV_STATUS_OK;
        const bool broken = xkv_context_refusal(ctx) != XKV_STATUS_OK;
        const int  more   = all.decode(ctx, llama_memory_seq_pos_max(mem, 0) + 1, 1);
        if (broken != (more != 0)) {
            return wrong(broken ? "a broken cache decodes" : "a cache does not decode and does not say that it is broken");
        }
        if (ok && broken && strcmp(what.name, "clear") != 0) {
            return wrong("an operation succeeds and breaks the cache");
        }
        if (!broken && !std::isfinite(llama_get_logits_ith(ctx, -1)[0])) {
            return wrong("a cache that goes on computes no numbers");
        }
        res.what = broken ? BROKEN : ok && !told ? WENT_ON : FAILED;
        llama_memory_clear(mem, true);
        if (xkv_context_refusal(ctx) != XKV_STATUS_OK) {
            return wrong("clearing does not mend the cache");
        }
        if (all.prompt(ctx) != expected) {
            return wrong("a cleared cache computes other numbers than a new one");
        }
    }
};

static int g_pipe = -1;

static void tell(const report & res) {
    if (write(g_pipe, &res, sizeof(res)) != (ssize_t) sizeof(res)) {
        _exit(3);
    }
    _exit(0);
}

static void ended(const char * text) {
    report res = { fault_was_of_upstream() ? OF_UPSTREAM : WRONG, 0, 0, true, "" };
    snprintf(res.text, sizeof(res.text), "the process ends: %.200s", text);
    tell(res);
}

// in place of ggml's
extern "C" void ggml_abort(const char * file, int line, const char * fmt, ...) {
    char text[256];
    snprintf(text, sizeof(text), "%.200s:%d: %.40s", file, line, fmt);
    ended(text);
    abort();
}

static void on_signal(int sig) {
    ended(sig == SIGSEGV ? "it reads or writes where nothing is" : sig == SIGALRM ? "it hangs" : "it aborts");
}

static report run_apart(const trial & t, llama_context * ctx, fault_kind kind, uint64_t n) {
    int fd[2];
    if (pipe(fd) != 0) {
        exit(1);
    }
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        g_pipe = fd[1];
        for (int sig : { SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGALRM }) {
            signal(sig, on_signal);
        }
        setenv("GGML_NO_BACKTRACE", "1", 1); // by a debugger, for a second each
        atexit([] { ended("it exits"); });
        alarm(60);
        tell(t.run(ctx, kind, n));
    }
    close(fd[1]);
    report        res = { WRONG, 0, 0, false, "the process ended without a word" };
    const ssize_t got = read(fd[0], &res, sizeof(res));
    close(fd[0]);
    waitpid(pid, nullptr, 0);
    if (got != (ssize_t) sizeof(res)) {
        res.what = WRONG;
    }
    return res;
}

static int check(const trial & t, llama_context * ctx, fault_kind kind, uint64_t n_most) {
    static const char * const kinds[FAULT_KINDS] = { "memory", "thread", "file" };

    const report none         = run_apart(t, ctx, kind, 0);
    uint64_t     n[N_OUTCOME] = {};
    int          n_failed     = 0;
    if (none.what == WRONG) {
        printf("FAIL %s: %s\n", t.what.name, none.text);
        return 1;
    }
    const uint64_t step = n_most > 0 ? std::max<uint64_t>(1, (none.n_call + n_most - 1) / n_most) : 1;
    for (uint64_t i = 1; i <= none.n_call; i += step) {
        report res = run_apart(t, ctx, kind, i);
        // upstream forgets buffers where the memory for their records fails
        const int64_t left = res.left - (ctx ? none.left : 0);
        if (res.what != WRONG && !res.of_upstream && left > N_SLACK) {
            res.what = WRONG;
            snprintf(res.text, sizeof(res.text), "%lld bytes are left that are not without a failure", (long long) left);
        }
        n[res.what]++;
        if (res.what == WRONG) {
            n_failed++;
            printf("FAIL %s, %s %llu of %llu: %s\n", t.what.name, kinds[kind], (unsigned long long) i, (unsigned long long) none.n_call,
                   res.text);
        } else if (res.what == OF_UPSTREAM && getenv("XKV_TEST_VERBOSE")) {
            printf("%s, %s %llu: %s\n", t.what.name, kinds[kind], (unsigned long long) i, res.text);
        }
    }
    printf("%-32s %-6s %6llu calls: %5llu went on, %5llu failed, %5llu broken, %5llu not opened, %5llu ended by upstream, %llu wrong\n",
           t.what.name, kinds[kind], (unsigned long long) none.n_call, (unsigned long long) n[WENT_ON], (unsigned long long) n[FAILED],
           (unsigned long long) n[BROKEN], (unsigned long long) n[NOT_OPENED], (unsigned long long) n[OF_UPSTREAM],
           (unsigned long long) n[WRONG]);
    fflush(stdout);
    return n_failed;
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL SIDECAR FOLDER TRIALS [OPERATION]\n", argv[0]);
        return 1;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const scenes   all(argv[1], argv[2], argv[3]);
    const uint64_t n_most = strtoull(argv[4], nullptr, 10);

    llama_context * other = all.open(2);
    if (!other || all.decode(other, 0, 600) != 0 || !llama_state_save_file(other, all.moved_path().c_str(), nullptr, 0)) {
        fprintf(stderr, "the context of twice n_ctx: %s\n", xkv_last_error());
        return 1;
    }
    llama_free(other);

    llama_context *    first    = all.open();
    std::vector<float> expected = first ? all.prompt(first) : std::vector<float>();
    if (expected.empty() || all.decode(first, 320, 380) != 0 || !llama_state_save_file(first, all.state_path().c_str(), nullptr, 0)) {
        fprintf(stderr, "the context without failures: %s\n", xkv_last_error());
        return 1;
    }
    llama_free(first);

    int n_failed = 0;
    for (const auto & what : list_scenes()) {
        if (argc > 5 && strcmp(argv[5], what.name) != 0) {
            continue;
        }
        llama_context * ctx = nullptr;
        if (what.n_token >= 0 && (!(ctx = all.open()) || all.decode(ctx, 0, what.n_token) != 0)) {
            fprintf(stderr, "%s cannot be prepared: %s\n", what.name, xkv_last_error());
            return 1;
        }
        for (int kind = 0; kind < FAULT_KINDS; ++kind) {
            n_failed += check({ all, what, expected }, ctx, (fault_kind) kind, n_most);
        }
        if (ctx) {
            llama_free(ctx);
        }
    }
    return n_failed > 0;
}
