#pragma once

#include <vector>

// The dense problems that online bases need, by BLAS and LAPACK, on the calling thread. Matrices are row-major.

// rows [n, dim], n <= dim: an orthonormal basis of the space that they span, in place; false when LAPACK fails
bool xkv_orthonormalize(std::vector<float> & rows, int n, int dim);

// the m largest values of symmetric a [n, n], descending, and their eigenvectors [m, n]; a is lost; false when LAPACK fails
bool xkv_eigen(std::vector<float> & a, int n, int m, std::vector<float> & values, std::vector<float> & vectors);

// sum [dim, dim] += x^T x of x [n, dim], whose rows are stride numbers apart (0: dim); in the lower triangle only
void xkv_add_gram(const std::vector<float> & x, int n, int dim, std::vector<float> & sum, int stride = 0);

// the lower triangle in the upper one too
void xkv_mirror(std::vector<float> & sum, int dim);

// a b^T [n, m] of a [n, dim] and b [m, dim]
std::vector<float> xkv_mul_rows(const std::vector<float> & a, const std::vector<float> & b, int n, int m, int dim);
