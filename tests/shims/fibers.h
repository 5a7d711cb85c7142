// Threads of a block as fibers on one CPU thread: each runs until it waits for others, so that a missing barrier gives wrong numbers
// every time. Threads that wait in different places, or for one that has ended, are an error.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fibers {

enum class order { forward, backward, shuffled };

enum class waiting { no, block, warp, done };

static const int n_lane = 32;

// A fiber starts by swapcontext; jumps, which leave signals alone and take a tenth of the time, do the rest. They need
// -U_FORTIFY_SOURCE.
struct fiber {
    ucontext_t context;
    jmp_buf    at;
    bool       started;
    waiting    wait;
    int        place; // where it waits
    unsigned   n_op;  // operations of the warp so far
    unsigned   n_or;  // votes of the block so far
};

typedef std::vector<uint8_t> stack;

// what the lanes of a warp give each other, for two operations in turn
struct warp_slots {
    uint64_t value[2][2 * n_lane];
};

struct block {
    std::vector<fiber>      all; // those of the largest block so far
    std::vector<stack>      stacks;
    int                     n_now = 0; // of this block
    std::vector<warp_slots> warps;
    std::function<void()>   body;
    jmp_buf                 main;
    int                     now = -1; // the thread that runs
    int                     votes[3]; // of the block, in turn
    std::string             error;

    int n() const { return n_now; }

    __attribute__((noinline)) void back() {
        if (_setjmp(all[now].at) == 0) {
            _longjmp(main, 1);
        }
    }

    void wait(waiting what, int place) {
        all[now].wait  = what;
        all[now].place = place;
        back();
    }

    // a lane's value and those of the others; behind them a second one of each
    uint64_t * share(uint64_t value, int place, uint64_t second = 0) {
        fiber &    f    = all[now];
        uint64_t * list = warps[now / n_lane].value[f.n_op++ & 1];

        list[now % n_lane]          = value;
        list[now % n_lane + n_lane] = second;
        wait(waiting::warp, place);
        return list;
    }

    // whether any thread has voted; comes before the wait
    int * vote(bool x) {
        fiber & f   = all[now];
        int *   res = &votes[f.n_or % 3];

        votes[(f.n_or + 1) % 3] = 0; // the one before last, which all have read
        f.n_or++;
        *res |= x;
        return res;
    }

    // A warp goes on to the next barrier before another one begins, so that they are as far apart as can be.
    void run(int n_thread, order how, unsigned seed) {
        begin(n_thread);
        const std::vector<int> warp_turn = turns((int) warps.size(), how, seed);
        const std::vector<int> lane_turn = turns(n_lane, how, seed + 1);
        bool                   more      = true;
        while (more) {
            for (int w : warp_turn) {
                do {
                    for (int i : lane_turn) {
                        now = w * n_lane + i;
                        if (now < n() && all[now].wait == waiting::no) {
                            go_on(all[now]);
                        }
                    }
                } while (error.empty() && release_warp(w));
            }
            more = error.empty() && release();
        }
    }

private:
    static block *& current() {
        static block * res;
        return res;
    }

    static std::vector<int> turns(int n, order how, unsigned seed) {
        std::vector<int> res(n);
        for (int i = 0; i < n; ++i) {
            res[i] = how == order::backward ? n - 1 - i : i;
        }
        for (int i = n; how == order::shuffled && i > 1; --i) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(res[i - 1], res[(seed >> 8) % i]);
        }
        return res;
    }

    __attribute__((noinline)) void go_on(fiber & f) {
        if (_setjmp(main) != 0) {
            return;
        }
        if (f.started) {
            _longjmp(f.at, 1);
        }
        f.started = true;
        setcontext(&f.context);
    }

    // goes on with the next block, since to make a fiber takes longer than most of them
    static void entry() {
        while (true) {
            block * b = current();
            b->body();
            b->all[b->now].wait = waiting::done;
            b->back();
        }
    }

    void begin(int n_thread) {
        current() = this;
        error.clear();
        n_now = n_thread;
        while ((int) all.size() < n_thread) {
            all.emplace_back();
            all.back().started = false;
            stacks.emplace_back(64 << 10);
        }
        warps.resize((n_thread + n_lane - 1) / n_lane);
        std::fill(votes, votes + 3, 0);
        for (int i = 0; i < n_thread; ++i) {
            fiber & f = all[i];
            if (!f.started || f.wait != waiting::done) {
                getcontext(&f.context);
                f.context.uc_stack.ss_sp   = stacks[i].data();
                f.context.uc_stack.ss_size = stacks[i].size();
                f.context.uc_link          = nullptr;
                makecontext(&f.context, entry, 0);
                f.started = false;
            }
            f.wait  = waiting::no;
            f.place = 0;
            f.n_op  = 0;
            f.n_or  = 0;
        }
    }

    // past the barrier that all threads have come to; false when all have ended
    bool release() {
        int done  = 0;
        int place = 0;
        for (int i = 0; i < n(); ++i) {
            const fiber & f = all[i];
            done += f.wait == waiting::done;
            place = f.wait == waiting::block ? f.place : place;
        }
        if (done == n()) {
            return false;
        }
        for (int i = 0; i < n(); ++i) {
            const fiber & f = all[i];
            if (f.wait == waiting::warp) {
                error = "some lanes of a warp wait for others";
            } else if (f.wait == waiting::block && f.place != place) {
                error = "threads wait at different barriers";
            }
        }
        if (done > 0 && error.empty()) {
            error = "a barrier that not all threads reach";
        }
        // one that has not come stays where it is, and is made anew for the next block
        for (int i = 0; i < n() && error.empty(); ++i) {
            all[i].wait = waiting::no;
        }
        return error.empty();
    }

    bool release_warp(int w) {
        const int first = w * n_lane;
        const int end   = std::min(first + n_lane, n());
        for (int i = first; i < end; ++i) {
            if (all[i].wait != waiting::warp) {
                return false;
            }
            if (all[i].place != all[first].place) {
                error = "lanes of a warp wait in different places";
                return false;
            }
        }
        for (int i = first; i < end; ++i) {
            all[i].wait = waiting::no;
        }
        return true;
    }
};

} // namespace fibers
