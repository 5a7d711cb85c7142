#include "base/xkv-lapack.h"

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
void XKV_LAPACK(ssyevd)(const char * jobz, const char * uplo, const int * n, float * a, const int * lda, float * w, float * work,
                        const int * lwork, int * iwork, const int * liwork, int * info);
}

// problems are solved side by side, one thread each
static void xkv_one_thread() {
#ifdef XKV_LAPACK_SCIPY
    static const bool once = (scipy_openblas_set_num_threads(1), true);
    (void) once;
#endif
}

bool xkv_orthonormalize(std::vector<float> & rows, int n, int dim) {
    xkv_one_thread();

    // row-major [n, dim] is LAPACK's dim x n
    int                info  = 0;
    const int          lwork = 64*std::max(n, 1);
    std::vector<float> tau(n);
    std::vector<float> work(lwork);
    XKV_LAPACK(sgeqrf)(&dim, &n, rows.data(), &dim, tau.data(), work.data(), &lwork, &info);
    if (info == 0) {
        XKV_LAPACK(sorgqr)(&dim, &n, &n, rows.data(), &dim, tau.data(), work.data(), &lwork, &info);
    }
    return info == 0;
}

bool xkv_eigen(std::vector<float> & a, int n, std::vector<float> & values) {
    xkv_one_thread();

    int              info   = 0;
    int              lwork  = -1;
    int              liwork = -1;
    float            size   = 0.0f;
    int              isize  = 0;
    values.resize(n);
    XKV_LAPACK(ssyevd)("V", "U", &n, a.data(), &n, values.data(), &size, &lwork, &isize, &liwork, &info);
    lwork  = (int) size;
    liwork = isize;
    std::vector<float> work(lwork);
    std::vector<int>   iwork(liwork);
    XKV_LAPACK(ssyevd)("V", "U", &n, a.data(), &n, values.data(), work.data(), &lwork, iwork.data(), &liwork, &info);
    if (info != 0) {
        return false;
    }
    std::reverse(values.begin(), values.end());
    // eigenvectors ascend, one per LAPACK column, which is a row here
    for (int i = 0; i < n/2; ++i) {
        std::swap_ranges(a.begin() + (size_t) i*n, a.begin() + (size_t) (i + 1)*n, a.begin() + (size_t) (n - 1 - i)*n);
    }
    return true;
}
