#pragma once

#include <vector>

// The two dense problems that online bases need, by LAPACK, on the calling thread. Matrices are row-major.

// rows [n, dim], n <= dim: an orthonormal basis of the space that they span, in place; false when LAPACK fails
bool xkv_orthonormalize(std::vector<float> & rows, int n, int dim);

// symmetric a [n, n]: in its place the eigenvectors as rows, by descending values; false when LAPACK fails
bool xkv_eigen(std::vector<float> & a, int n, std::vector<float> & values);
