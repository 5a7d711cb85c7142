// Which tokens leave the window, and the tables of chunks: what needs no model.

#include "flow/xkv-select.h"
#include "window/xkv-chunks.h"

#include <cstdio>
#include <vector>

static int n_failed = 0;

#define CHECK(x)                                                                                                                           \
    do {                                                                                                                                   \
        if (!(x)) {                                                                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                                                        \
            n_failed++;                                                                                                                    \
        }                                                                                                                                  \
    } while (0)

using ints = std::vector<uint32_t>;

static xkv_seq_set seqs(std::vector<int> list) {
    xkv_seq_set res;
    for (int s : list) {
        res.set(s);
    }
    return res;
}

// positions [p0, p1) of a sequence, in cells from 100 on
static std::vector<xkv_token> tokens(llama_pos p0, llama_pos p1) {
    std::vector<xkv_token> res;
    for (llama_pos p = p0; p < p1; ++p) {
        res.push_back({ p, (uint32_t) (100 + p), seqs({ 0 }), false });
    }
    return res;
}

static void test_whole_chunks() {
    const auto jobs = xkv_select(tokens(0, 100), { 4, 16, 32 });

    CHECK(jobs.size() == 2); // 80 may leave: two chunks, and 16 that would need younger ones
    CHECK(jobs[0].pos == 4 && jobs[0].cells.size() == 32);
    CHECK(jobs[1].pos == 36 && jobs[1].cells.size() == 32);
    CHECK(jobs[0].cells.front() == 104 && jobs[1].cells.back() == 167);
    CHECK(jobs[0].offsets.front() == 0 && jobs[0].offsets.back() == 31);
    CHECK(xkv_job_cells(jobs).size() == 64);
}

static void test_nothing_leaves() {
    CHECK(xkv_select({}, { 4, 16, 32 }).empty());
    CHECK(xkv_select(tokens(0, 20), { 4, 16, 32 }).empty());
    CHECK(xkv_select(tokens(0, 51), { 4, 16, 32 }).empty());
    CHECK(xkv_select(tokens(0, 52), { 4, 16, 32 }).size() == 1);
}

static void test_holes() {
    auto list = tokens(0, 100);
    list.erase(list.begin() + 10, list.begin() + 50);
    const auto jobs = xkv_select(list, { 4, 16, 32 });

    CHECK(jobs.size() == 2); // a hole ends a chunk where its positions would be too far apart
    CHECK(jobs[0].pos == 4 && jobs[0].cells == (ints{ 104, 105, 106, 107, 108, 109 }));
    CHECK(jobs[1].pos == 50 && jobs[1].cells.size() == 32);
}

static void test_same_positions() {
    auto list = tokens(0, 100);
    for (auto & token : list) {
        token.pos /= 4;
    }
    const auto jobs = xkv_select(list, { 4, 16, 32 });

    CHECK(jobs.size() == 2); // divided positions: a chunk has room for so many tokens, however close they are
    CHECK(jobs[0].pos == 1 && jobs[0].cells.size() == 32 && jobs[0].offsets.back() == 7);
    CHECK(jobs[0].cells.front() == 104); // four stay, as many as there are sinks

    for (auto & token : list) {
        token.pos = 3;
    }
    CHECK(xkv_select(list, { 4, 16, 32 }).size() == 2 && xkv_select(list, { 4, 16, 32 })[0].cells.front() == 104);
}

static void test_moved_chunks() {
    xkv_chunk_table table(32, 4);
    table.put(2, { 40, 4, seqs({ 0 }), { 0, 3, 3, 9 } });

    CHECK(table[2].slots(43, 49) == (ints{ 1, 2 }) && table[2].slots(43, 49, false) == (ints{ 0, 3 }));
    CHECK(table.find(0, 44, 49).empty() && table.find(0, 49, 50) == (ints{ 2 })); // a hole is no part of the chunk
    table.take(2, { 2, 3 });
    CHECK(table[2].n == 2 && table[2].first() == 43 && table[2].end() == 50);
    table.move(2, -43);
    CHECK(table[2].pos == -3 && table.pos_min(0) == 0 && table.pos_max(0) == 6); // its frame begins below 0
    table.take(2, {});
    CHECK(table.empty());
}

static void test_sequences() {
    auto list = tokens(0, 100);
    for (int i = 0; i < 20; ++i) {
        list[i].seqs = seqs({ 0, 1 });
    }
    const auto jobs = xkv_select(list, { 4, 16, 32 });

    CHECK(jobs.size() == 3);
    CHECK(jobs[0].cells.size() == 16 && jobs[0].seqs == seqs({ 0, 1 }));
    CHECK(jobs[1].pos == 20 && jobs[1].seqs == seqs({ 0 }));
}

static void test_sinks() {
    auto list     = tokens(0, 52);
    list[10].sink = true;
    CHECK(xkv_select(list, { 4, 16, 32 }).size() == 1); // 31 tokens: the chunk's positions end here
    list[3].sink = true;
    CHECK(xkv_select(list, { 0, 16, 32 }).front().cells.size() == 30);

    const ints cells = { 7, 8, 9, 10 };
    CHECK(xkv_select_sinks(cells, { 0.04f, 0.5f, 0.01f, 0.02f }, 2) == (ints{ 9, 10 }));
    CHECK(xkv_select_sinks(cells, { 0.04f, 0.5f, 0.01f, 0.02f }, 9) == (ints{ 9, 10, 7 }));
    CHECK(xkv_select_sinks(cells, { 0.05f, 0.5f, 0.10f, 0.20f }, 9).empty());
}

static void test_leave_out() {
    auto jobs = xkv_select(tokens(0, 100), { 4, 16, 32 });

    ints cells = { 104, 110 };
    for (uint32_t cell = 136; cell < 168; ++cell) {
        cells.push_back(cell);
    }
    xkv_leave_out(jobs, cells);
    CHECK(jobs.size() == 1);
    CHECK(jobs[0].pos == 4 && jobs[0].cells.size() == 30); // the frame begins where it began
    CHECK(jobs[0].cells.front() == 105 && jobs[0].offsets.front() == 1);

    const auto chunk = jobs[0].chunk();
    CHECK(chunk.n == 30 && chunk.end() == 36 && chunk.seqs == seqs({ 0 }));
}

static void test_stage() {
    const ints n_slot = { 256, 1024 };
    CHECK(xkv_select_stage(n_slot, 0, 32, 8) == 0);
    CHECK(xkv_select_stage(n_slot, 0, 32, 9) == 1);
    CHECK(xkv_select_stage(n_slot, 1, 32, 1) == 1); // never back
    CHECK(xkv_select_stage(n_slot, 0, 32, 33) == 2);
}

static void test_table() {
    xkv_chunk_table table(32, 8);
    CHECK(table.empty() && table.pos_min(0) == -1 && table.pos_max(0) == -1);

    table.put(1, { 10, 3, seqs({ 0, 1 }), { 1, 5, 9 } });
    table.put(4, { 50, 2, seqs({ 1 }), { 0, 1 } });
    CHECK(table.used() == (ints{ 1, 4 }));
    CHECK(table.free(4) == (ints{ 0, 2, 3, 5 }));
    CHECK(table.free(99).size() == 6);
    CHECK(table.n_slot() == 160 && table.n_token() == 5 && table.n_token(0) == 3);
    CHECK(table.pos_min(0) == 11 && table.pos_max(0) == 19 && table.pos_max(1) == 51);

    CHECK(table.find(1, 0, 10).empty());
    CHECK(table.find(1, 19, 51) == (ints{ 1, 4 }));
    CHECK(table.find(0, 0, 99) == (ints{ 1 }));

    xkv_chunk_table other(32, 8);
    other.copy(table, 7);
    CHECK(other.n_token(7) == 5 && other.n_token(1) == 0);

    table.seq_rm(1, 0);
    CHECK(table.n_token(0) == 0 && table.n_token(1) == 5);
    table.seq_rm(1, 1);
    CHECK(table.used() == (ints{ 4 }));
    table.seq_add(4, 2);
    table.seq_keep(2);
    CHECK(table[4].seqs == seqs({ 2 }));
    table.seq_keep(0);
    CHECK(table.empty());
}

int main() {
    test_whole_chunks();
    test_nothing_leaves();
    test_holes();
    test_same_positions();
    test_moved_chunks();
    test_sequences();
    test_sinks();
    test_leave_out();
    test_stage();
    test_table();
    return n_failed > 0;
}
