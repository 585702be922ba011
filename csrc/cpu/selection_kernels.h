// The inner loops of selection, one table for each instruction set.
//
// All work on a tile: up to kTile consecutive scores. Bitmaps have one bit per score in words of 64
// bits, the lowest index in the lowest bit.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace emp_fast::cpu {

constexpr int kTile = 4096;
constexpr int kTileWords = kTile / 64;
constexpr int kSlack = 16;  // keys that `classify` may write past the last one

struct TileCounts {
  int above;    // keys > high
  int bracket;  // low <= keys <= high
};

struct KeyCounts {
  int above;  // keys > threshold
  int ties;   // keys == threshold
};

struct SelectionKernels {
  // order_key of n scores.
  void (*order_keys)(const float* scores, int n, uint32_t* keys);

  // Marks the scores above the bracket and those inside. Writes the keys of the latter, in index
  // order, to `keys`, which has kTile + kSlack elements. Reads each score from memory once.
  TileCounts (*classify)(const float* scores, int n, uint32_t low, uint32_t high, uint64_t* above,
                         uint64_t* bracket, uint32_t* keys);

  KeyCounts (*count)(const uint32_t* keys, int n, uint32_t threshold);

  // Marks in `words` the bracket's scores whose key is at least `cutoff`; the keys are in index
  // order.
  void (*mark_from)(const uint64_t* bracket, const uint32_t* keys, uint32_t cutoff, int num_words,
                    uint64_t* words);

  // Writes base + the position of every set bit to [out, out_end); returns the end of what it
  // wrote.
  int64_t* (*expand)(const uint64_t* words, int num_words, int64_t base, int64_t* out,
                     int64_t* out_end);
};

EMP_FAST_FOR_EACH_ISA(SelectionKernels, selection_kernels)

}  // namespace emp_fast::cpu
