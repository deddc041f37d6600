// Products of fp32 on processors that multiply tiles of bf16 (AMX): each operand in two bf16 parts, high + low, and
// high high + high low + low high summed in fp32. A part has 8 bits, so an operand keeps 2^-16 of itself: enough for
// operands computed from 16-bit inputs, which bring 2^-9. Only finite operands: inf * 0 of two parts would be NaN.
//
// Operands are pairs of two successive depths, a word each: A [rows, depth / 2], B [depth / 2, columns].
#pragma once

#include "cpu/gemm.h"

namespace condense::cpu::CONDENSE_ISA {

#if defined(__AMX_BF16__)
template <class T>
constexpr bool kSplits = !std::is_same_v<T, float>;
#else
template <class T>
constexpr bool kSplits = false;
#endif

struct Halves {
  uint32_t *high, *low;
};

CONDENSE_INLINE VecU32 load(const uint32_t* p) { return bits_as<VecU32>(load(reinterpret_cast<const float*>(p))); }
CONDENSE_INLINE void store_up_to(uint32_t* p, VecU32 v, int64_t n) {
  store_up_to(reinterpret_cast<float*>(p), bits_as<Vec>(v), n);
}

// The words of lanes x0[c] and x1[c], to high[c] and low[c]. `invalid` stays 0 as long as all parts are finite.
CONDENSE_INLINE void split_pairs(Vec x0, Vec x1, int64_t n, uint32_t* high, uint32_t* low, Vec& invalid) {
  constexpr uint32_t kUpper = 0xffff0000u, kHalf = 0x8000u;  // to nearest, ties away from zero
  const VecU32 high0 = (bits_as<VecU32>(x0) + kHalf) & kUpper, high1 = (bits_as<VecU32>(x1) + kHalf) & kUpper;
  const Vec rest0 = x0 - bits_as<Vec>(high0), rest1 = x1 - bits_as<Vec>(high1);
  invalid = fma(rest0, Vec{}, fma(rest1, Vec{}, invalid));
  store_up_to(high, high1 | high0 >> 16, n);
  const VecU32 low0 = bits_as<VecU32>(rest0) + kHalf, low1 = bits_as<VecU32>(rest1) + kHalf;
  store_up_to(low, (low1 & kUpper) | low0 >> 16, n);
}

// The same of neighbouring lanes, to kWidth / 2 words.
CONDENSE_INLINE void split_neighbours(Vec x, uint32_t* high, uint32_t* low, Vec& invalid) {
  constexpr uint32_t kHalf = 0x8000u;
  const VecU32 upper = (bits_as<VecU32>(x) + kHalf) >> 16;
  const Vec rest = x - bits_as<Vec>(upper << 16);
  invalid = fma(rest, Vec{}, invalid);
  const VecU16 highs = __builtin_convertvector(upper, VecU16);
  const VecU16 lows = __builtin_convertvector((bits_as<VecU32>(rest) + kHalf) >> 16, VecU16);
  std::memcpy(high, &highs, sizeof(highs));
  std::memcpy(low, &lows, sizeof(lows));
}

CONDENSE_INLINE bool all_zero(Vec x) { return sum(x) == 0.0f; }

#if defined(__AMX_BF16__)

// to[c][r] = from[r][c] for 16 x 16 words.
CONDENSE_INLINE void transpose(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(from + r * from_row);
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {  // a[r + i]: column 4 q + i of rows r to r + 3, in quarter q
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(even0, even1, 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  }
}

// C [m x 32] (+)= A [m x depth] B [depth x 32], m and depth multiples of 32, rows of A, B and C that far apart in
// words. The caller holds Tiles<bf16>.
static inline void multiply_split(Halves a, int64_t a_row, int64_t m, Halves b, int64_t b_row, int64_t depth, float* c,
                                  int64_t c_row, bool add) {
  finish_writes();
  for (int64_t i = 0; i < m; i += 32) {
    float* to = c + i * c_row;
    if (add) {
      _tile_loadd(0, to, c_row * 4);
      _tile_loadd(1, to + 16, c_row * 4);
      _tile_loadd(2, to + 16 * c_row, c_row * 4);
      _tile_loadd(3, to + 16 * c_row + 16, c_row * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth / 2; k += 16) {
      const int64_t left = i * a_row + k, right = k * b_row;
      const auto products = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      };
      _tile_loadd(4, a.low + left, a_row * 4);
      _tile_loadd(5, a.low + left + 16 * a_row, a_row * 4);
      _tile_loadd(6, b.high + right, b_row * 4);
      _tile_loadd(7, b.high + right + 16, b_row * 4);
      products();
      _tile_loadd(4, a.high + left, a_row * 4);
      _tile_loadd(5, a.high + left + 16 * a_row, a_row * 4);
      products();
      _tile_loadd(6, b.low + right, b_row * 4);
      _tile_loadd(7, b.low + right + 16, b_row * 4);
      products();
    }
    _tile_stored(0, to, c_row * 4);
    _tile_stored(1, to + 16, c_row * 4);
    _tile_stored(2, to + 16 * c_row, c_row * 4);
    _tile_stored(3, to + 16 * c_row + 16, c_row * 4);
  }
  finish_writes();
}

#else

static inline void multiply_split(Halves, int64_t, int64_t, Halves, int64_t, int64_t, float*, int64_t, bool) {}
static inline void transpose(const uint32_t*, int64_t, uint32_t*, int64_t) {}

#endif

}  // namespace condense::cpu::CONDENSE_ISA
