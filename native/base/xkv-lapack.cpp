#include "base/xkv-lapack.h"

#include "base/xkv-parallel.h"

#include <algorithm>

#ifdef XKV_LAPACK_SCIPY
#    define XKV_LAPACK(name) scipy_##name##_
extern "C" void scipy_openblas_set_num_threads(int n);
#else
#    define XKV_LAPACK(name) name##_
#endif

extern "C" {
void XKV_LAPACK(sgeqrf)(const int * m, const int * n, float * a, const int * lda, float * tau, float * work, const int * lwork, int * info);
void XKV_LAPACK(sorgqr)(const int * m, const int * n, const int * k, float * a, const int * lda, const float * tau, float * work,
                        const int * lwork, int * info);
void XKV_LAPACK(ssyevr)(const char * jobz, const char * range, const char * uplo, const int * n, float * a, const int * lda,
                        const float * vl, const float * vu, const int * il, const int * iu, const float * abstol, int * m, float * w,
                        float * z, const int * ldz, int * isuppz, float * work, const int * lwork, int * iwork, const int * liwork,
                        int * info);
void XKV_LAPACK(sgemm)(const char * transa, const char * transb, const int * m, const int * n, const int * k, const float * alpha,
                       const float * a, const int * lda, const float * b, const int * ldb, const float * beta, float * c, const int * ldc);
}

// problems are solved side by side, one thread each
static void xkv_one_thread() {
#ifdef XKV_LAPACK_SCIPY
    static const bool once = (scipy_openblas_set_num_threads(1), true);
    (void) once;
#endif
}

bool xkv_orthonormalize(xkv_floats & rows, int n, int dim, int n_old, xkv_floats & meet) {
    xkv_one_thread();

    // row-major [n, dim] is LAPACK's dim x n
    int        info  = 0;
    const int  lwork = 64 * std::max(n, 1);
    xkv_floats tau(n);
    xkv_floats work(lwork);
    XKV_LAPACK(sgeqrf)(&dim, &n, rows.data(), &dim, tau.data(), work.data(), &lwork, &info);
    if (info == 0) {
        meet.assign((size_t) n * n_old, 0.0f); // R of the factors Q R
        for (int j = 0; j < n_old; ++j) {
            for (int i = 0; i <= j; ++i) {
                meet[(size_t) i * n_old + j] = rows[(size_t) j * dim + i];
            }
        }
        XKV_LAPACK(sorgqr)(&dim, &n, &n, rows.data(), &dim, tau.data(), work.data(), &lwork, &info);
    }
    return info == 0;
}

bool xkv_eigen(xkv_floats & a, int n, int m, xkv_floats & values, xkv_floats & vectors) {
    xkv_one_thread();

    // all of them: for some, ssyevr takes inverse iteration, which is slower
    const float zero   = 0.0f;
    const int   none   = 0;
    int         found  = 0;
    int         info   = 0;
    int         lwork  = -1;
    int         liwork = -1;
    float       size   = 0.0f;
    int         isize  = 0;

    std::vector<int> support(2 * (size_t) n);
    values.resize(n);
    vectors.resize((size_t) n * n);
    const auto run = [&](float * work, int * iwork) {
        XKV_LAPACK(ssyevr)
        ("V", "A", "U", &n, a.data(), &n, &zero, &zero, &none, &none, &zero, &found, values.data(), vectors.data(), &n, support.data(),
         work, &lwork, iwork, &liwork, &info);
    };
    run(&size, &isize);
    lwork  = (int) size;
    liwork = isize;
    std::vector<float> work(lwork);
    std::vector<int>   iwork(liwork);
    run(work.data(), iwork.data());
    if (info != 0 || found != n) {
        return false;
    }
    // values ascend; an eigenvector is a LAPACK column, which is a row here
    for (int i = 0; i < n / 2; ++i) {
        std::swap_ranges(vectors.begin() + (size_t) i * n, vectors.begin() + (size_t) (i + 1) * n,
                         vectors.begin() + (size_t) (n - 1 - i) * n);
    }
    vectors.resize((size_t) m * n);
    std::reverse(values.begin(), values.end());
    values.resize(m);
    return true;
}

// products are dealt in pieces of this many rows or columns, whatever the number of threads is, so that results are the same
static const int XKV_LAPACK_BLOCK = 96;

// f(first, n) for pieces of 0 .. size - 1, the last ones first: of a triangle they are the largest
template <typename F> static void xkv_each_piece(int size, int n_thread, F && f) {
    xkv_one_thread();
    const int n_piece = (size + XKV_LAPACK_BLOCK - 1) / XKV_LAPACK_BLOCK;
    xkv_parallel(n_piece, n_thread, [&](size_t i) {
        const int first = (n_piece - 1 - (int) i) * XKV_LAPACK_BLOCK;
        f(first, std::min(XKV_LAPACK_BLOCK, size - first));
    });
}

void xkv_add_gram(const xkv_floats & x, int n, int dim, xkv_floats & sum, int n_thread) {
    const float one = 1.0f;
    xkv_each_piece(dim, n_thread, [&](int first, int m) {
        const int n_col = first + m;
        XKV_LAPACK(sgemm)
        ("N", "T", &n_col, &m, &n, &one, x.data(), &dim, x.data() + first, &dim, &one, sum.data() + (size_t) first * dim, &dim);
    });
}

void xkv_mirror(xkv_floats & sum, int dim) {
    for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < i; ++j) {
            sum[(size_t) j * dim + i] = sum[(size_t) i * dim + j];
        }
    }
}

void xkv_add_mul_rows(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, xkv_floats & sum, int n_thread) {
    const float one = 1.0f;
    const auto  mul = [&](int i, int ni, int j, int nj) {
        XKV_LAPACK(sgemm)
        ("T", "N", &nj, &ni, &dim, &one, b.data() + (size_t) j * dim, &dim, a.data() + (size_t) i * dim, &dim, &one,
         sum.data() + (size_t) i * m + j, &m);
    };
    if (n > 0 && m > 0 && dim > 0) {
        xkv_each_piece(std::max(n, m), n_thread, [&](int first, int k) { n > m ? mul(first, k, 0, m) : mul(0, n, first, k); });
    }
}

xkv_floats xkv_mul_rows(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, int n_thread) {
    xkv_floats res((size_t) n * m, 0.0f);
    xkv_add_mul_rows(a, b, n, m, dim, res, n_thread);
    return res;
}

void xkv_add_mul(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, float factor, xkv_floats & sum, int n_thread) {
    const float one = 1.0f;
    if (n > 0 && m > 0) {
        xkv_each_piece(dim, n_thread, [&](int first, int k) {
            XKV_LAPACK(sgemm)("N", "N", &k, &n, &m, &factor, b.data() + first, &dim, a.data(), &m, &one, sum.data() + first, &dim);
        });
    }
}

void xkv_add_cross(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, xkv_floats & sum, int n_thread) {
    const float one = 1.0f;
    xkv_each_piece(dim, n_thread, [&](int first, int k) {
        XKV_LAPACK(sgemm)("N", "T", &k, &m, &n, &one, b.data() + first, &dim, a.data(), &m, &one, sum.data() + first, &dim);
    });
}
