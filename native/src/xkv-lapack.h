#pragma once

#include <vector>

// The two dense problems that online bases need, by LAPACK, on the calling thread. Matrices are row-major.

// rows [n, dim], n <= dim: an orthonormal basis of the space that they span, in place; false when LAPACK fails
bool xkv_orthonormalize(std::vector<float> & rows, int n, int dim);

// symmetric a and positive definite b [n, n]: a x = w b x. In place of a: rows of x by descending w, with x b x^T = 1.
// false, and a as it was, when b is not positive definite; false when LAPACK fails
bool xkv_eigen(std::vector<float> & a, std::vector<float> b, int n);
