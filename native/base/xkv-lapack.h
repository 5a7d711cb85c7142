#pragma once

#include "base/xkv-memory.h"

#include <vector>

// The dense problems that online bases need, by BLAS and LAPACK: products on several threads, the rest on the calling one. Matrices
// are row-major.

// rows [n, dim], n <= dim: an orthonormal basis of the space that they span, in place, and in meet [n, n_old] its products with the
// first n_old of them as they were; false when LAPACK fails
bool xkv_orthonormalize(xkv_floats & rows, int n, int dim, int n_old, xkv_floats & meet);

// the m largest values of symmetric a [n, n], descending, and their eigenvectors [m, n]; a is lost; false when LAPACK fails
bool xkv_eigen(xkv_floats & a, int n, int m, xkv_floats & values, xkv_floats & vectors);

// sum [dim, dim] += x^T x of x [n, dim]; in the lower triangle only
void xkv_add_gram(const xkv_floats & x, int n, int dim, xkv_floats & sum, int n_thread);

// the lower triangle in the upper one too
void xkv_mirror(xkv_floats & sum, int dim);

// sum [n, dim] += factor times a b of a [n, m] and b [m, dim]
void xkv_add_mul(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, float factor, xkv_floats & sum, int n_thread);

// sum [m, dim] += a^T b of a [n, m] and b [n, dim]
void xkv_add_cross(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, xkv_floats & sum, int n_thread);

// a b^T [n, m] of a [n, dim] and b [m, dim]
xkv_floats xkv_mul_rows(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, int n_thread);

// sum [n, m] += the same
void xkv_add_mul_rows(const xkv_floats & a, const xkv_floats & b, int n, int m, int dim, xkv_floats & sum, int n_thread);
