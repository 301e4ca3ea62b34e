// The product of tokens and features in tiles that stay in registers. Every value is handed to the caller while it is
// there, so the product itself is never stored.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastfg {

// Vec is a vector of numbers in a register. A tile has ROWS tokens and 2 vectors of features: 12 sums, which leaves room
// for the factors in 16 registers.
template <typename scalar_t, typename Vec>
struct Tiles {
  static constexpr int64_t ROWS = 6, COLUMNS = 2 * Vec::size();

  // x [n, d] in groups of ROWS tokens, each [d, ROWS]; the last group is filled up with zeros.
  static void pack_tokens(const scalar_t* x, int64_t n, int64_t d, scalar_t* packed) {
    for (int64_t t = 0; t < n; t += ROWS, packed += d * ROWS) {
      for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t i = 0; i < d; i++) packed[i * ROWS + r] = t + r < n ? x[(t + r) * d + i] : scalar_t(0);
      }
    }
  }

  // COLUMNS features from f on, of W [d, F] with any strides, as [d, COLUMNS]; zeros past F.
  static void pack_features(
      const scalar_t* W, int64_t f, int64_t F, int64_t d, int64_t row_stride, int64_t column_stride, scalar_t* packed) {
    const int64_t n = std::min(COLUMNS, F - f);
    if (column_stride == 1) {
      for (int64_t i = 0; i < d; i++) {
        for (int64_t c = 0; c < COLUMNS; c++) {
          packed[i * COLUMNS + c] = c < n ? W[i * row_stride + f + c] : scalar_t(0);
        }
      }
      return;
    }
    constexpr int64_t LINE = 64 / sizeof(scalar_t);
    for (int64_t top = 0; top < d; top += LINE) {  // a cache line of each feature at a time
      for (int64_t i = top; i < std::min(top + LINE, d); i++) {
        for (int64_t c = 0; c < COLUMNS; c++) {
          packed[i * COLUMNS + c] = c < n ? W[i * row_stride + (f + c) * column_stride] : scalar_t(0);
        }
      }
    }
  }

  // bias + x @ W for one group of tokens and one of features. The sums run over d in ascending order.
  static void multiply(const scalar_t* x, const scalar_t* W, const scalar_t* bias, int64_t d, Vec (&sums)[ROWS][2]) {
    const Vec left = Vec::loadu(bias), right = Vec::loadu(bias + Vec::size());
    Vec c00 = left, c01 = right, c10 = left, c11 = right, c20 = left, c21 = right;
    Vec c30 = left, c31 = right, c40 = left, c41 = right, c50 = left, c51 = right;
    for (int64_t i = 0; i < d; i++, x += ROWS, W += COLUMNS) {
      const Vec w0 = Vec::loadu(W), w1 = Vec::loadu(W + Vec::size());
      c00 = fmadd(Vec(x[0]), w0, c00), c01 = fmadd(Vec(x[0]), w1, c01);
      c10 = fmadd(Vec(x[1]), w0, c10), c11 = fmadd(Vec(x[1]), w1, c11);
      c20 = fmadd(Vec(x[2]), w0, c20), c21 = fmadd(Vec(x[2]), w1, c21);
      c30 = fmadd(Vec(x[3]), w0, c30), c31 = fmadd(Vec(x[3]), w1, c31);
      c40 = fmadd(Vec(x[4]), w0, c40), c41 = fmadd(Vec(x[4]), w1, c41);
      c50 = fmadd(Vec(x[5]), w0, c50), c51 = fmadd(Vec(x[5]), w1, c51);
    }
    sums[0][0] = c00, sums[0][1] = c01, sums[1][0] = c10, sums[1][1] = c11, sums[2][0] = c20, sums[2][1] = c21;
    sums[3][0] = c30, sums[3][1] = c31, sums[4][0] = c40, sums[4][1] = c41, sums[5][0] = c50, sums[5][1] = c51;
  }
};

}  // namespace fastfg
