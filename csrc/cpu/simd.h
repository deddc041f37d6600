// Vectors of fp32 as wide as this translation unit's instruction set, and conversions on load and store.
//
// Included once per instruction set, inside a namespace of its own (see isa.h): the same source gives SSE, AVX2,
// AVX-512 and, through the compiler's vector types, NEON. Nothing here may be a function that other instruction sets
// share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "condense/tensor.h"

#ifndef CONDENSE_ISA
#error "include this from a translation unit that names its instruction set"
#endif

namespace condense::cpu::CONDENSE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kWidth)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * kWidth)));

#define CONDENSE_INLINE static inline __attribute__((always_inline))

CONDENSE_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: it changes -0

template <class To, class From>
CONDENSE_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// --- fp16 <-> fp32 where the processor has no instruction for it

CONDENSE_INLINE Vec widen_f16(VecU16 half) {
#if defined(__AVX512F__)
  return bits_as<Vec>(_mm512_cvtph_ps(bits_as<__m256i>(half)));
#elif defined(__F16C__)
  return bits_as<Vec>(_mm256_cvtph_ps(bits_as<__m128i>(half)));
#else
  const VecU32 wide = __builtin_convertvector(half, VecU32);
  const VecU32 magnitude = (wide & 0x7fffu) << 13;
  // A multiplication by 2^112 moves the exponent's bias and makes subnormals normal; infinities and NaN need theirs
  // set.
  const Vec scaled = bits_as<Vec>(magnitude) * 0x1p112f;
  const VecU32 special = bits_as<VecU32>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return bits_as<Vec>((bits_as<VecU32>(scaled) | special) | ((wide & 0x8000u) << 16));
#endif
}

CONDENSE_INLINE VecU16 narrow_f16(Vec x) {
#if defined(__AVX512F__)
  return bits_as<VecU16>(_mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_as<VecU16>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU32 all = bits_as<VecU32>(x), sign = (all >> 16) & 0x8000u, magnitude = all & 0x7fffffffu;
  // Normal: round to nearest even at bit 13. Subnormal: adding 0.5 lets the fp32 adder do the rounding.
  const VecU32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const VecU32 subnormal = bits_as<VecU32>(bits_as<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU32 infinite = VecU32{} + 0x7c00u, nan = VecU32{} + 0x7e00u;
  VecU32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinite : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | sign, VecU16);
#endif
}

CONDENSE_INLINE VecU16 narrow_bf16(Vec x) {
  const VecU32 all = bits_as<VecU32>(x);
  const VecU32 rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VecU32 nan = (all >> 16) | 0x40u;
  const VecU32 chosen = (all & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  return __builtin_convertvector(chosen, VecU16);
}

// --- loads and stores, at any address

CONDENSE_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

CONDENSE_INLINE Vec load(const bf16* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  return bits_as<Vec>(__builtin_convertvector(half, VecU32) << 16);
}

CONDENSE_INLINE Vec load(const f16* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  return widen_f16(half);
}

CONDENSE_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

CONDENSE_INLINE void store(bf16* p, Vec v) {
  const VecU16 half = narrow_bf16(v);
  std::memcpy(p, &half, sizeof(half));
}

CONDENSE_INLINE void store(f16* p, Vec v) {
  const VecU16 half = narrow_f16(v);
  std::memcpy(p, &half, sizeof(half));
}

// The first n < kWidth lanes; the others are `fill`, and nothing beyond is touched.
template <class T>
CONDENSE_INLINE Vec load_part(const T* p, int64_t n, float fill = 0.0f) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  Vec v = load(lanes);
  if (fill != 0.0f) {
    for (int64_t i = n; i < kWidth; ++i) v[i] = fill;
  }
  return v;
}

template <class T>
CONDENSE_INLINE void store_part(T* p, Vec v, int64_t n) {
  T lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// The first min(n, kWidth) lanes: a whole vector, which is nearly always asked for, goes the short way.
template <class T>
CONDENSE_INLINE Vec load_up_to(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : load_part(p, n);
}

template <class T>
CONDENSE_INLINE void store_up_to(T* p, Vec v, int64_t n) {
  n >= kWidth ? store(p, v) : store_part(p, v, n);
}

// 2 kWidth elements of bf16, the even ones and the odd ones: half of what it takes to widen and to narrow them in
// order. fp32 beside them is arranged alike: kWidth even ones, kWidth odd ones.
CONDENSE_INLINE void load_paired(const bf16* p, Vec& even, Vec& odd) {
  VecU32 both;
  std::memcpy(&both, p, sizeof(both));
  even = bits_as<Vec>(both << 16), odd = bits_as<Vec>(both & 0xffff0000u);
}

CONDENSE_INLINE void store_paired(bf16* p, Vec even, Vec odd) {
  const auto round = [](Vec x) __attribute__((always_inline)) {  // as narrow_bf16, in the upper half
    const VecU32 all = bits_as<VecU32>(x);
    return (all & 0x7fffffffu) > 0x7f800000u ? all | 0x400000u : all + 0x7fffu + ((all >> 16) & 1u);
  };
  const VecU32 both = (round(odd) & 0xffff0000u) | round(even) >> 16;
  std::memcpy(p, &both, sizeof(both));
}

CONDENSE_INLINE void arrange_paired(const float* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += 2 * kWidth) {
    for (int i = 0; i < kWidth; ++i) to[c + i] = from[c + 2 * i], to[c + kWidth + i] = from[c + 2 * i + 1];
  }
}

CONDENSE_INLINE float load_one(const float* p) { return *p; }
CONDENSE_INLINE float load_one(const bf16* p) { return bits_as<float>(uint32_t{p->bits} << 16); }
CONDENSE_INLINE float load_one(const f16* p) { return load_part(p, 1)[0]; }

// --- arithmetic

CONDENSE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bits_as<Vec>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
  return bits_as<Vec>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  return a * b + c;
#endif
}

// b where the two compare unordered.
CONDENSE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
CONDENSE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

CONDENSE_INLINE Vec abs(Vec a) { return bits_as<Vec>(bits_as<VecU32>(a) & 0x7fffffffu); }

CONDENSE_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bits_as<__m512>(v));
#else
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

CONDENSE_INLINE float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits_as<__m512>(v));
#else
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
#endif
}

// The sums of four vectors, to four places: shared shuffles make it cheaper than four sums.
CONDENSE_INLINE void sum4(const Vec* v, float* to) {
#if defined(__AVX2__)
  __m256 halves[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m512 x = bits_as<__m512>(v[i]);
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    halves[i] = bits_as<__m256>(v[i]);
#endif
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  std::memcpy(to, &sums, sizeof(sums));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
#endif
}

// e^r on [-ln2/2, ln2/2], a minimax polynomial.
CONDENSE_INLINE Vec exp_of_rest(Vec r) {
  Vec p = splat(0x1.6850e4p-10f);
  p = fma(p, r, splat(0x1.123bccp-7f));
  p = fma(p, r, splat(0x1.555b98p-5f));
  p = fma(p, r, splat(0x1.55548ep-3f));
  p = fma(p, r, splat(0x1.fffff8p-2f));
  p = fma(p, r, splat(1.0f));
  return fma(p, r, splat(1.0f));
}

// e^x, within 2 ulp; 0 below -87.3 (subnormal results are flushed), inf above 88.7, NaN for NaN.
CONDENSE_INLINE Vec exp(Vec x) {
#if defined(__AVX512F__)
  // Scaling by 2^n is one instruction here, which overflows as it should; max and min hand on a NaN that comes second.
  const __m512 given = bits_as<__m512>(x);
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-87.4f), _mm512_min_ps(_mm512_set1_ps(88.8f), given));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(0x1.715476p0f)), 0);
  const Vec whole = bits_as<Vec>(n),
            r = fma(whole, splat(-0x1.7f7d1cp-20f), fma(whole, splat(-0x1.62e4p-1f), bits_as<Vec>(clamped)));
  const __mmask16 normal = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-87.33655f), _CMP_NLT_UQ);
  return bits_as<Vec>(_mm512_maskz_scalef_ps(normal, bits_as<__m512>(exp_of_rest(r)), n));
#else
  const Vec magic = splat(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  const Vec clamped = max(min(splat(88.8f), x), splat(-87.4f));
  const Vec shifted = fma(clamped, splat(0x1.715476p0f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0x1.62e4p-1f), clamped);  // ln 2 in two parts, the first exact in n * part
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  const Vec p = exp_of_rest(r);
  // 2^n in two factors, so that n = 128 does not overflow before p is multiplied in.
  const VecI whole = bits_as<VecI>(shifted) - 0x4b400000, half = whole >> 1;
  const Vec scaled = p * bits_as<Vec>((half + 127) << 23) * bits_as<Vec>((whole - half + 127) << 23);
  const Vec finite = x > splat(88.72284f) ? splat(INFINITY) : scaled;
  const Vec bounded = x < splat(-87.33655f) ? splat(0.0f) : finite;
  return x == x ? bounded : x;
#endif
}

// The natural logarithm of a positive normal number, within 2 ulp; -inf for 0, NaN for a negative one.
CONDENSE_INLINE Vec log(Vec x) {
  const VecI bits = bits_as<VecI>(x) - 0x3f2aaaab;  // x = 2^n m with m in [2/3, 4/3)
  const Vec n = __builtin_convertvector(bits >> 23, Vec);
  const Vec r = bits_as<Vec>((bits & 0x7fffff) + 0x3f2aaaab) - 1.0f;
  // A series of atanh: s = r / (2 + r), log(1 + r) = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 1/5.
  const Vec s = r / (r + 2.0f), s2 = s * s;
  Vec q = splat(2.0f / 11);
  q = fma(q, s2, splat(2.0f / 9));
  q = fma(q, s2, splat(2.0f / 7));
  q = fma(q, s2, splat(2.0f / 5));
  q = fma(q, s2, splat(2.0f / 3));
  const Vec tail = fma(s * s2, q, s * 2.0f);
  const Vec out = fma(n, splat(0x1.62e43p-1f), tail);
  const Vec special = x == splat(0.0f) ? splat(-INFINITY) : splat(NAN);
  const Vec upper = x == splat(INFINITY) ? x : out;
  return x > splat(0.0f) ? upper : special;
}

}  // namespace condense::cpu::CONDENSE_ISA
