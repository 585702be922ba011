// The inner loops of selection for one instruction set; see selection_kernels.h for what each does.
#include <cstring>

#include "core/order_key.h"
#include "cpu/selection_kernels.h"
#include "cpu/simd.h"

namespace emp_fast::cpu::EMP_FAST_ISA {
namespace {

// order_key without branches, so that a loop over scores becomes vector instructions.
inline uint32_t key_of(const float* score) {
  uint32_t bits;
  std::memcpy(&bits, score, sizeof bits);
  const uint32_t magnitude = bits & 0x7FFFFFFFu, sign = 0u - (bits >> 31);
  const uint32_t key = 0x80000000u + ((magnitude ^ sign) - sign);
  return static_cast<int32_t>(magnitude) > 0x7F800000 ? kNanKey : key;
}

#if defined(__AVX512F__)

// Order keys minus 2^31: signed integers of the same order.
inline __m512i signed_keys(__m512i bits) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i sign = _mm512_maskz_srai_epi32(kAllLanes, bits, 31);
  const __m512i key = _mm512_sub_epi32(_mm512_xor_si512(magnitude, sign), sign);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  return _mm512_mask_mov_epi32(key, nan, _mm512_set1_epi32(INT32_MIN));
}

#elif defined(__AVX2__)

inline __m256i signed_keys(__m256i bits) {
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i sign = _mm256_srai_epi32(bits, 31);
  const __m256i key = _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign);
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  return _mm256_blendv_epi8(key, _mm256_set1_epi32(INT32_MIN), nan);
}

inline uint32_t lane_mask(__m256i lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}

#endif

void order_keys(const float* scores, int n, uint32_t* keys) {
  for (int i = 0; i < n; ++i) keys[i] = key_of(scores + i);
}

TileCounts classify(const float* scores, int n, uint32_t low, uint32_t high, uint64_t* above,
                    uint64_t* bracket, uint32_t* keys) {
  int num_above = 0, num_bracket = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i flip = _mm512_set1_epi32(INT32_MIN);
  const __m512i low_key = _mm512_set1_epi32(static_cast<int32_t>(low ^ 0x80000000u));
  const __m512i high_key = _mm512_set1_epi32(static_cast<int32_t>(high ^ 0x80000000u));
  for (; i + 64 <= n; i += 64) {
    uint64_t above_word = 0, bracket_word = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512i key = signed_keys(_mm512_loadu_si512(scores + i + 16 * part));
      const __mmask16 over = _mm512_cmpgt_epi32_mask(key, high_key);
      const __mmask16 in = static_cast<__mmask16>(_mm512_cmpge_epi32_mask(key, low_key) & ~over);
      above_word |= static_cast<uint64_t>(over) << (16 * part);
      bracket_word |= static_cast<uint64_t>(in) << (16 * part);
      // Few lanes are in the bracket, at random. An unconditional store is cheaper than a
      // mispredicted branch.
      _mm512_storeu_si512(keys + num_bracket,
                          _mm512_xor_si512(_mm512_maskz_compress_epi32(in, key), flip));
      num_bracket += __builtin_popcount(in);
    }
    above[i / 64] = above_word;
    bracket[i / 64] = bracket_word;
    num_above += __builtin_popcountll(above_word);
  }
#elif defined(__AVX2__)
  const __m256i low_key = _mm256_set1_epi32(static_cast<int32_t>(low ^ 0x80000000u));
  const __m256i high_key = _mm256_set1_epi32(static_cast<int32_t>(high ^ 0x80000000u));
  for (; i + 64 <= n; i += 64) {
    uint64_t above_word = 0, below_word = 0;
    for (int part = 0; part < 8; ++part) {
      const __m256i key =
          signed_keys(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + i + 8 * part)));
      above_word |= static_cast<uint64_t>(lane_mask(_mm256_cmpgt_epi32(key, high_key)))
                    << (8 * part);
      below_word |= static_cast<uint64_t>(lane_mask(_mm256_cmpgt_epi32(low_key, key)))
                    << (8 * part);
    }
    const uint64_t bracket_word = ~(above_word | below_word);
    above[i / 64] = above_word;
    bracket[i / 64] = bracket_word;
    num_above += __builtin_popcountll(above_word);
    for (uint64_t rest = bracket_word; rest != 0; rest &= rest - 1) {
      keys[num_bracket++] = key_of(scores + i + __builtin_ctzll(rest));
    }
  }
#endif
  for (; i < n; i += 64) {
    const int width = n - i < 64 ? n - i : 64;
    uint32_t word_keys[64];
    order_keys(scores + i, width, word_keys);
    uint64_t above_word = 0, bracket_word = 0;
    for (int bit = 0; bit < width; ++bit) {
      const uint32_t key = word_keys[bit];
      const bool over = key > high;
      const bool in = key >= low && !over;
      above_word |= static_cast<uint64_t>(over) << bit;
      bracket_word |= static_cast<uint64_t>(in) << bit;
      keys[num_bracket] = key;
      num_bracket += in;
    }
    above[i / 64] = above_word;
    bracket[i / 64] = bracket_word;
    num_above += __builtin_popcountll(above_word);
  }
  return {num_above, num_bracket};
}

KeyCounts count(const uint32_t* keys, int n, uint32_t threshold) {
  KeyCounts counts{0, 0};
  for (int i = 0; i < n; ++i) {
    counts.above += keys[i] > threshold;
    counts.ties += keys[i] == threshold;
  }
  return counts;
}

void mark_from(const uint64_t* bracket, const uint32_t* keys, uint32_t cutoff, int num_words,
               uint64_t* words) {
  for (int w = 0; w < num_words; ++w) {
    uint64_t selected = 0;
    for (uint64_t rest = bracket[w]; rest != 0; rest &= rest - 1) {
      const uint64_t lowest = rest & (~rest + 1);
      selected |= *keys++ >= cutoff ? lowest : 0;  // branchless: the outcome is unpredictable
    }
    words[w] |= selected;
  }
}

int64_t* expand(const uint64_t* words, int num_words, int64_t base, int64_t* out,
                [[maybe_unused]] int64_t* out_end) {
  for (int w = 0; w < num_words; ++w, base += 64) {
    uint64_t word = words[w];
#if defined(__AVX512F__)
    // Writes whole vectors as long as they stay inside the output. The next vectors overwrite the
    // excess lanes.
    if (out_end - out >= 64 + 16) {
      const __m512i start = _mm512_set1_epi64(base);
      __m512i offset = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      for (int part = 0; part < 4; ++part, word >>= 16) {
        const __mmask16 bits = static_cast<__mmask16>(word);
        const __m512i found = _mm512_maskz_compress_epi32(bits, offset);
        const auto widened = [](__m256i half) { return _mm512_maskz_cvtepu32_epi64(0xFF, half); };
        const __m512i low = widened(_mm512_maskz_extracti64x4_epi64(0xFF, found, 0));
        const __m512i high = widened(_mm512_maskz_extracti64x4_epi64(0xFF, found, 1));
        _mm512_storeu_si512(out, _mm512_add_epi64(start, low));
        _mm512_storeu_si512(out + 8, _mm512_add_epi64(start, high));
        out += __builtin_popcount(bits);
        offset = _mm512_add_epi32(offset, _mm512_set1_epi32(16));
      }
      continue;
    }
#endif
    for (; word != 0; word &= word - 1) *out++ = base + __builtin_ctzll(word);
  }
  return out;
}

}  // namespace

const SelectionKernels selection_kernels = {order_keys, classify, count, mark_from, expand};

}  // namespace emp_fast::cpu::EMP_FAST_ISA
