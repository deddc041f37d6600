// select: the tokens with the highest scores [B, G, N], in ascending order, of each head or of all heads of a sequence.
//
// An exact radix select. Scores become 32-bit keys that order as tokens rank; a histogram of their first 11 bits finds
// the digit in which the last kept token lies, and only the keys with that digit are looked at for the next 11 and the
// last 10 bits. What comes out is the key of the last kept token and how many equal to it are kept, so a last pass over
// the keys, in order of position, emits the result without sorting anything. Across heads, histograms of all heads are
// added and the steps alternate with the decision; a single head goes through all of it on one thread, its keys in L2.
//
// Reads the scores once, 4 bytes each, and writes 8 per kept token; scratch is 8 bytes per token for each thread, or
// for each head of a sequence.
//
// Specification: condense_core/ops/reference/select.py.
#pragma once

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

// Keys: -inf is never kept, NaN ranks below every number, protected tokens with +inf.
constexpr uint32_t kNeverKey = 0, kNanKey = 1, kInfinityKey = 0xff800000u;
constexpr int kDigits = 3, kDigitShift[kDigits] = {21, 10, 0};
constexpr int64_t kBins = 2048;
constexpr int kCopies = 4;  // of a histogram while counting: adding to one bin again and again would wait for itself

CONDENSE_INLINE VecU32 rank_keys(Vec scores) {
  VecU32 bits = bits_as<VecU32>(scores);
  const VecU32 magnitude = bits & 0x7fffffffu;
  bits = magnitude == 0u ? magnitude : bits;  // -0 is 0
  const VecU32 negative = bits_as<VecU32>(bits_as<VecI>(bits) >> 31);
  VecU32 keys = bits ^ (negative | 0x80000000u);
  keys = magnitude > 0x7f800000u ? VecU32{} + kNanKey : keys;
  return bits == 0xff800000u ? VecU32{} + kNeverKey : keys;
}

// One head on its way: keys [room], those that share the digits decided so far, and the histogram of the next digit.
struct HeadKeys {
  uint32_t *keys, *candidates, *histogram;
  int64_t num_candidates, above, equal;  // above, equal: tokens above the last kept key, and with it
};

// Of all keys that begin with the digits of `key`, the highest `wanted` are kept.
struct LastKept {
  uint32_t key;
  int64_t wanted;
};

inline void count_digit(const uint32_t* keys, int64_t n, int digit, uint32_t* counts) {
  const int shift = kDigitShift[digit];
  const uint32_t mask = digit < 2 ? 2047 : 1023;
  int64_t i = 0;
  for (; i + kCopies <= n; i += kCopies) {
    for (int c = 0; c < kCopies; ++c) ++counts[c * kBins + (keys[i + c] >> shift & mask)];
  }
  for (; i < n; ++i) ++counts[keys[i] >> shift & mask];
}

// Keys whose bits from `shift` on are `digits`, in order; `to` may be `keys`. Room for a whole vector behind the last.
inline int64_t keep_matching(const uint32_t* keys, int64_t n, int shift, uint32_t digits, uint32_t* to) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i wanted = _mm512_set1_epi32(static_cast<int>(digits));
  const __m128i by = _mm_cvtsi32_si128(shift);
  for (; i + kWidth <= n; i += kWidth) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 match = _mm512_cmpeq_epi32_mask(_mm512_srl_epi32(key, by), wanted);
    _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(match, key));
    count += __builtin_popcount(match);
  }
#endif
  for (; i < n; ++i) {
    const uint32_t key = keys[i];
    to[count] = key;
    count += key >> shift == digits;
  }
  return count;
}

// Positions of keys above `last`, and of the first `equal` ones equal to it, ascending: writes exactly `count`.
inline void emit_positions(const uint32_t* keys, int64_t n, uint32_t last, int64_t equal, int64_t count, int64_t* out) {
  int64_t written = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(last));
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + kWidth <= n && written < count; i += kWidth) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    unsigned keep = _mm512_cmpgt_epu32_mask(key, threshold);
    unsigned tied = _mm512_cmpeq_epi32_mask(key, threshold);
    if (tied) {
      if (__builtin_popcount(tied) > equal) tied = _pdep_u32((1u << equal) - 1u, tied);  // the first of them
      equal -= __builtin_popcount(tied);
      keep |= tied;
    }
    const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), position);
    const unsigned filled = (1u << __builtin_popcount(keep)) - 1u;
    _mm512_mask_storeu_epi64(out + written, static_cast<__mmask8>(filled),
                             _mm512_cvtepi32_epi64(_mm512_castsi512_si256(kept)));
    _mm512_mask_storeu_epi64(out + written + 8, static_cast<__mmask8>(filled >> 8),
                             _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(kept, 1)));
    written += __builtin_popcount(keep);
    position = _mm512_add_epi32(position, _mm512_set1_epi32(kWidth));
  }
#endif
  for (; i < n && written < count; ++i) {
    const bool tied = keys[i] == last;
    out[written] = i;
    written += (keys[i] > last) | (tied & (equal > 0));
    equal -= tied;
  }
}

// Keys of a head, its protected tokens raised, and their first digit counted.
inline void make_keys(const float* scores, int64_t n, const View& protect, int64_t b, uint32_t* keys,
                      uint32_t* counts) {
  constexpr int64_t kBlock = 4096;  // keys that are still in L1 when they are counted
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = first + kBlock < n ? first + kBlock : n;
    int64_t i = first;
    for (; i + kWidth <= last; i += kWidth) {
      const VecU32 key = rank_keys(load(scores + i));
      std::memcpy(keys + i, &key, sizeof(key));
    }
    if (i < last) {
      const VecU32 key = rank_keys(load_part(scores + i, last - i));
      std::memcpy(keys + i, &key, (last - i) * sizeof(uint32_t));
    }
    for (int64_t p = 0; protect && p < protect.size[1]; ++p) {
      const int64_t offset = (protect.size[0] > 1 ? b * protect.stride[0] : 0) + p * protect.stride[1];
      const int64_t start = integer_at(protect, offset), stop = integer_at(protect, offset + protect.stride[2]);
      const int64_t end = stop < last ? stop : last;
      for (i = start > first ? start : first; i < end; ++i) keys[i] = keys[i] == kNeverKey ? kNeverKey : kInfinityKey;
    }
    count_digit(keys + first, last - first, 0, counts);
  }
}

// The histogram of a digit over what is left of a head. counts: kCopies * kBins of scratch.
inline void count_head(HeadKeys& head, const float* scores, int64_t n, const View& protect, int64_t b, int digit,
                       const LastKept& last, uint32_t* counts) {
  std::memset(counts, 0, kCopies * kBins * sizeof(uint32_t));
  if (digit == 0) {
    make_keys(scores, n, protect, b, head.keys, counts);
  } else {
    const uint32_t* from = digit == 1 ? head.keys : head.candidates;
    const int shift = kDigitShift[digit - 1];
    head.num_candidates =
        keep_matching(from, digit == 1 ? n : head.num_candidates, shift, last.key >> shift, head.candidates);
    count_digit(head.candidates, head.num_candidates, digit, counts);
  }
  for (int64_t bin = 0; bin < kBins; ++bin) {
    uint32_t sum = 0;
    for (int c = 0; c < kCopies; ++c) sum += counts[c * kBins + bin];
    head.histogram[bin] = sum;
  }
}

// The next digit of the last kept key, from the histograms of all heads that share it.
inline void decide_digit(HeadKeys* heads, int64_t num_heads, int digit, LastKept& last) {
  const auto tokens_in = [&](int64_t first, int64_t bins) {
    int64_t total = 0;
    for (int64_t h = 0; h < num_heads; ++h) {
      uint32_t sum = 0;
      for (int64_t bin = first; bin < first + bins; ++bin) sum += heads[h].histogram[bin];
      total += sum;
    }
    return total;
  };
  constexpr int64_t kBlock = 64;  // bins at a time at first, for most of them are far above
  int64_t end = kBins;
  for (int64_t here; end > kBlock && (here = tokens_in(end - kBlock, kBlock)) < last.wanted; end -= kBlock) {
    last.wanted -= here;
  }
  int64_t bin = end - 1;
  for (int64_t here; bin > 0 && (here = tokens_in(bin, 1)) < last.wanted; --bin) last.wanted -= here;
  last.key |= static_cast<uint32_t>(bin) << kDigitShift[digit];
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t above = bin + 1; above < kBins; ++above) heads[h].above += heads[h].histogram[above];
    heads[h].equal = heads[h].histogram[bin];
  }
}

inline void select(const View& scores, int64_t budget, bool across_heads, const View& protect, const View& indices,
                   const View& counts, int threads) {
  constexpr const char* op = "select";
  CONDENSE_CHECK_SHAPE(scores, kAny, kAny, kAny);
  CONDENSE_CHECK_DTYPE(scores, Dtype::f32);
  CONDENSE_CHECK_ROWS(scores);
  const int64_t batch = scores.size[0], kv_heads = scores.size[1], n = scores.size[2];
  CONDENSE_CHECK(n < INT32_MAX, "scores has ", n, " tokens, expected fewer than 2^31 - 1");
  CONDENSE_CHECK_NOT_NEGATIVE(budget);
  if (protect) {
    CONDENSE_CHECK_INTEGER(protect, 3);
    CONDENSE_CHECK_SHAPE(protect, protect.size[0] == 1 ? 1 : batch, kAny, 2);
  }
  if (budget > n) budget = n;
  const int64_t width = across_heads ? kv_heads * budget : budget;
  if (across_heads) {
    CONDENSE_CHECK_PACKED(indices, Dtype::i64, batch, width);
  } else {
    CONDENSE_CHECK_PACKED(indices, Dtype::i64, batch, kv_heads, width);
  }
  CONDENSE_CHECK_PACKED(counts, Dtype::i64, batch, kv_heads);
  int64_t *const out = indices.as<int64_t>(), *const kept = counts.as<int64_t>();
  if (width == 0) {
    for (int64_t i = 0; i < batch * kv_heads; ++i) kept[i] = 0;
    return;
  }
  if (threads < 1) threads = 1;
  const int64_t room = (n + 31) / 16 * 16, slots = across_heads ? kv_heads : threads;
  const int64_t slot_words = 2 * room + kBins;
  const int64_t words = slots * slot_words + threads * kCopies * kBins;
  const Scratch scratch(words * 4 + slots * static_cast<int64_t>(sizeof(HeadKeys)));
  uint32_t* const all_counts = scratch.at<uint32_t>() + slots * slot_words;
  HeadKeys* const heads = scratch.at<HeadKeys>(words * 4);
  const auto reset = [&](int64_t slot) {
    uint32_t* const own = scratch.at<uint32_t>() + slot * slot_words;
    heads[slot] = {own, own + room, own + 2 * room, 0, 0, 0};
  };
  const auto scores_of = [&](int64_t head) {
    return scores.as<const float>() + head / kv_heads * scores.stride[0] + head % kv_heads * scores.stride[1];
  };
  const auto counts_of = [&](int worker) { return all_counts + worker * kCopies * kBins; };

  if (!across_heads) {
    parallel_for(batch * kv_heads, threads, [&](int64_t head, int worker) {
      HeadKeys& own = heads[worker];
      reset(worker);
      LastKept last{0, budget};
      for (int digit = 0; digit < kDigits; ++digit) {
        count_head(own, scores_of(head), n, protect, head / kv_heads, digit, last, counts_of(worker));
        decide_digit(&own, 1, digit, last);
      }
      if (last.key == kNeverKey) last.wanted = 0;
      const int64_t count = own.above + last.wanted;
      emit_positions(own.keys, n, last.key, last.wanted, count, out + head * width);
      for (int64_t i = count; i < width; ++i) out[head * width + i] = -1;
      kept[head] = count;
    });
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < kv_heads; ++g) reset(g);
    LastKept last{0, width};
    for (int digit = 0; digit < kDigits; ++digit) {
      parallel_for(kv_heads, threads, [&](int64_t g, int worker) {
        count_head(heads[g], scores_of(b * kv_heads + g), n, protect, b, digit, last, counts_of(worker));
      });
      decide_digit(heads, kv_heads, digit, last);
    }
    if (last.key == kNeverKey) last.wanted = 0;
    int64_t end = 0;
    for (int64_t g = 0; g < kv_heads; ++g) {  // equal tokens go to the earlier heads
      if (heads[g].equal > last.wanted) heads[g].equal = last.wanted;
      last.wanted -= heads[g].equal;
      kept[b * kv_heads + g] = heads[g].above + heads[g].equal;
      heads[g].num_candidates = end;  // from here on: where the head's positions begin
      end += kept[b * kv_heads + g];
    }
    parallel_for(kv_heads, threads, [&](int64_t g, int) {
      emit_positions(heads[g].keys, n, last.key, heads[g].equal, kept[b * kv_heads + g],
                     out + b * width + heads[g].num_candidates);
    });
    for (int64_t i = end; i < width; ++i) out[b * width + i] = -1;
  }
}

}  // namespace condense::cpu::CONDENSE_ISA
