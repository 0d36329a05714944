// c (m x n) = a (m x k) b (k x n) of 64-bit integers, which wrap. Row-major; n is a multiple of 32.
#include <immintrin.h>
#include <stdint.h>

enum { ROWS = 6, LANES = 8, COLUMNS = 4 * LANES, DEPTH = 256 };

// Up to ROWS rows by COLUMNS columns stay in registers, while `depth` products are added to each.
static inline void tile(int rows, const int64_t *a, long lda, const int64_t *b, int64_t *c, long n, long depth) {
  __m512i sum[ROWS][4];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < 4; j++) sum[i][j] = _mm512_loadu_si512(c + i * n + j * LANES);
  for (long p = 0; p < depth; p++) {
    __m512i row[4];
    for (int j = 0; j < 4; j++) row[j] = _mm512_loadu_si512(b + p * COLUMNS + j * LANES);
    for (int i = 0; i < rows; i++) {
      __m512i x = _mm512_set1_epi64(a[i * lda + p]);
      for (int j = 0; j < 4; j++) sum[i][j] = _mm512_add_epi64(sum[i][j], _mm512_mullo_epi64(x, row[j]));
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < 4; j++) _mm512_storeu_si512(c + i * n + j * LANES, sum[i][j]);
}

void ring_matmul(const int64_t *a, const int64_t *b, int64_t *c, long m, long k, long n) {
  static int64_t panel[DEPTH * COLUMNS];
  for (long i = 0; i < m * n; i++) c[i] = 0;
  for (long p = 0; p < k; p += DEPTH) {
    long depth = k - p < DEPTH ? k - p : DEPTH;
    for (long j = 0; j < n; j += COLUMNS) {
      for (long q = 0; q < depth; q++)
        for (int l = 0; l < COLUMNS; l++) panel[q * COLUMNS + l] = b[(p + q) * n + j + l];
      long i = 0;
      for (; i + ROWS <= m; i += ROWS) tile(ROWS, a + i * k + p, k, panel, c + i * n + j, n, depth);
      for (; i < m; i++) tile(1, a + i * k + p, k, panel, c + i * n + j, n, depth);
    }
  }
}
