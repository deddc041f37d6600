// Small matrix products whose operands stay in a core's caches: C = A B^T over head_dim, for scores, and C += A B over
// tokens, for sums. fp32; with bf16 inputs and a processor that multiplies pairs of bf16 (AVX512-BF16) or tiles of them
// (AMX), products of the inputs as they are, summed in fp32 (subnormal inputs count as zero there).
//
// A tile of C, kTileRows x kPanel, stays in registers while the depth is walked: two loads of B and a broadcast of A
// for every 2 * kTileRows vector operations.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

constexpr int kPanel = 2 * kWidth;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 of 32 registers hold C
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- fp32

template <int kRows>
CONDENSE_INLINE void tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth,
                          int64_t depth, float* c, int64_t c_row, bool add) {
  Vec sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = add ? load(c + r * c_row) : Vec{};
    sums[r][1] = add ? load(c + r * c_row + kWidth) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec left = load(b + k * b_depth), right = load(b + k * b_depth + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec one = splat(a[r * a_row + k * a_depth]);
      sums[r][0] = fma(one, left, sums[r][0]);
      sums[r][1] = fma(one, right, sums[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_row, sums[r][0]);
    store(c + r * c_row + kWidth, sums[r][1]);
  }
}

// C [m x kPanel] (+)= A [m x depth] B [depth x kPanel], every stride in elements. Inlined into a large caller, the
// compiler keeps the caller's values in the registers that the tile needs.
__attribute__((noinline)) static void multiply_panel(const float* a, int64_t a_row, int64_t a_depth, int64_t m,
                                                     const float* b, int64_t b_depth, int64_t depth, float* c,
                                                     int64_t c_row, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    tile<kTileRows>(a + i * a_row, a_row, a_depth, b, b_depth, depth, c + i * c_row, c_row, add);
  }
  for (; i + 4 <= m; i += 4) tile<4>(a + i * a_row, a_row, a_depth, b, b_depth, depth, c + i * c_row, c_row, add);
  for (; i < m; ++i) tile<1>(a + i * a_row, a_row, a_depth, b, b_depth, depth, c + i * c_row, c_row, add);
}

// --- scores: C [m x n] = A [m x d] B [n x d]^T, operands copied into the layout that the processor wants

// What the products are made of.
#if defined(__AVX512BF16__)
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <class T>
using Factor = float;
#endif

template <class F>
constexpr int64_t depth_of(int64_t d) {
  return std::is_same_v<F, bf16> ? round_up(d, 32) : d;
}
constexpr int64_t rows_of(int64_t m) { return round_up(m, 32); }  // rows that C and a copy of A need room for
constexpr int64_t columns_of(int64_t n) { return round_up(n, kPanel); }

CONDENSE_INLINE void convert(const float* from, int64_t n, float* to) { std::memcpy(to, from, n * sizeof(float)); }
CONDENSE_INLINE void convert(const bf16* from, int64_t n, bf16* to) { std::memcpy(to, from, n * sizeof(bf16)); }
template <class T>
CONDENSE_INLINE void convert(const T* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += kWidth) store_up_to(to + c, load_up_to(from + c, n - c), n - c);
}

// m rows of d to [rows_of(m), depth_of(d)], zeros around.
template <class T>
static inline void copy_rows(const T* rows, int64_t stride, int64_t m, int64_t d, Factor<T>* to) {
  using F = Factor<T>;
  const int64_t depth = depth_of<F>(d);
  for (int64_t i = 0; i < m; ++i) {
    convert(rows + i * stride, d, to + i * depth);
    for (int64_t c = d; c < depth; ++c) to[i * depth + c] = F{};
  }
  std::memset(static_cast<void*>(to + m * depth), 0, (rows_of(m) - m) * depth * sizeof(F));
}

// n rows of d to panels: fp32 [n / kPanel][d][kPanel], bf16 [n / 32][depth / 2][32][2], zeros around.
template <class T>
static inline void pack(const T* rows, int64_t stride, int64_t n, int64_t d, Factor<T>* panels) {
  if constexpr (std::is_same_v<Factor<T>, bf16>) {
    const int64_t depth = depth_of<bf16>(d);
    std::memset(static_cast<void*>(panels), 0, columns_of(n) * depth * sizeof(bf16));
    for (int64_t j = 0; j < n; ++j) {
      bf16* column = panels + j / 32 * 32 * depth + j % 32 * 2;
      const T* row = rows + j * stride;
      int64_t c = 0;
      for (; c + 2 <= d; c += 2) std::memcpy(column + c * 32, row + c, 4);
      if (c < d) column[c * 32] = row[c];
    }
  } else {
    for (int64_t j = 0; j < columns_of(n); ++j) {
      float* column = panels + j / kPanel * kPanel * d + j % kPanel;
      const T* row = rows + j * stride;
      if (j >= n) {
        for (int64_t c = 0; c < d; ++c) column[c * kPanel] = 0.0f;
        continue;
      }
      int64_t c = 0;
      for (; c + kWidth <= d; c += kWidth) {
        float lanes[kWidth];
        store(lanes, load(row + c));
        for (int lane = 0; lane < kWidth; ++lane) column[(c + lane) * kPanel] = lanes[lane];
      }
      for (; c < d; ++c) column[c * kPanel] = load_one(row + c);
    }
  }
}

// C [m x n], rows c_row apart, of a copy of A and panels of B. Writes rows_of(m) x columns_of(n).
static inline void multiply(const float* a, int64_t m, const float* panels, int64_t n, int64_t depth, float* c,
                            int64_t c_row) {
  for (int64_t j = 0; j < n; j += kPanel) {
    multiply_panel(a, depth, 1, m, panels + j * depth, kPanel, depth, c + j, c_row, false);
  }
}

#if defined(__AMX_BF16__)

// GCC's tile intrinsics do not say which memory they read: what was written before must have been.
CONDENSE_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

// The tile registers, configured for this thread as long as it lives, if products of F need them.
template <class F>
class Tiles {
 public:
  Tiles() {
    if constexpr (!std::is_same_v<F, bf16>) return;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) shape.bytes[t] = 64, shape.rows[t] = 16;
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~Tiles() {
    if constexpr (std::is_same_v<F, bf16>) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

static inline void multiply(const bf16* a, int64_t m, const bf16* panels, int64_t n, int64_t depth, float* c,
                            int64_t c_row) {
  finish_writes();
  for (int64_t j = 0; j < n; j += 32) {
    for (int64_t i = 0; i < m; i += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < depth; k += 32) {
        const bf16* b = panels + j * depth + k * 32;
        _tile_loadd(4, a + i * depth + k, depth * 2);
        _tile_loadd(5, a + (i + 16) * depth + k, depth * 2);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 32, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* to = c + i * c_row + j;
      _tile_stored(0, to, c_row * 4);
      _tile_stored(1, to + 16, c_row * 4);
      _tile_stored(2, to + 16 * c_row, c_row * 4);
      _tile_stored(3, to + 16 * c_row + 16, c_row * 4);
    }
  }
  finish_writes();
}

#else

template <class F>
struct Tiles {
  Tiles() {}  // not trivial, so that it may stand unused
};

#if defined(__AVX512BF16__)
template <int kRows>
CONDENSE_INLINE void tile_of_pairs(const bf16* a, int64_t depth, const bf16* b, float* c, int64_t c_row) {
  __m512 sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512bh left = bits_as<__m512bh>(_mm512_loadu_si512(b + k * 32));
    const __m512bh right = bits_as<__m512bh>(_mm512_loadu_si512(b + k * 32 + 32));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * depth + k, sizeof(pair));
      const __m512bh both = bits_as<__m512bh>(_mm512_set1_epi32(pair));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(c + r * c_row, sums[r][0]);
    _mm512_storeu_ps(c + r * c_row + 16, sums[r][1]);
  }
}

static inline void multiply(const bf16* a, int64_t m, const bf16* panels, int64_t n, int64_t depth, float* c,
                            int64_t c_row) {
  for (int64_t j = 0; j < n; j += 32) {
    int64_t i = 0;
    for (; i + 12 <= m; i += 12) tile_of_pairs<12>(a + i * depth, depth, panels + j * depth, c + i * c_row + j, c_row);
    for (; i < m; ++i) tile_of_pairs<1>(a + i * depth, depth, panels + j * depth, c + i * c_row + j, c_row);
  }
}
#endif
#endif

}  // namespace condense::cpu::CONDENSE_ISA
