// Exact radix selection, highest digit first: the arithmetic of one pass, for host and device.
//
// An element is an order key, followed by the index counted down, so that of equal keys the lowest
// index wins and no two elements are equal. Selecting the k highest elements means finding the
// k-th. Each pass counts the next digit of the elements that agree with the digits known so far,
// and fixes that digit.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace emp_fast::cuda {

struct Element {
  uint32_t key;        // order_key of the score
  uint64_t countdown;  // 2^index_bits - 1 - index
};

EMP_FAST_HD uint64_t countdown_of(int64_t index, int index_bits) {
  return ((uint64_t{1} << index_bits) - 1) - static_cast<uint64_t>(index);
}

// A digit of the element; the digits of the key come before those of the countdown.
struct Digit {
  int in_countdown;
  int shift;
  int width;

  EMP_FAST_HD unsigned of(const Element& element) const {
    const uint64_t word = in_countdown ? element.countdown : element.key;
    return static_cast<unsigned>(word >> shift) & ((1u << width) - 1u);
  }
};

// The digit of pass `pass`, of at most digit_bits bits. Returns false after the last pass.
EMP_FAST_HD bool nth_digit(int pass, int digit_bits, int index_bits, Digit& digit) {
  int left = pass;
  for (int word = 0; word < 2; ++word) {
    const int bits = word ? index_bits : 32;
    const int passes = (bits + digit_bits - 1) / digit_bits;
    if (left < passes) {
      const int top = bits - left * digit_bits;
      const int width = top < digit_bits ? top : digit_bits;
      digit = {word, top - width, width};
      return true;
    }
    left -= passes;
  }
  return false;
}

enum class SelectStatus : int32_t { kOpen, kFound, kNothing };

// What is known of the k-th element. kFound: key and countdown are that element, or a lower bound
// of it with no other element in between.
struct SelectState {
  uint64_t remaining;  // elements to take among those that agree with the known digits
  uint64_t countdown;
  uint32_t key;
  SelectStatus status;
  uint64_t unused;  // pads to kStateBytes, a sector of memory

  EMP_FAST_HD static SelectState start(uint64_t k) {
    return {k, 0, 0, k == 0 ? SelectStatus::kNothing : SelectStatus::kOpen, 0};
  }

  // Whether the element agrees with every digit before `digit`.
  EMP_FAST_HD bool agrees(const Element& element, const Digit& digit) const {
    const int known = digit.shift + digit.width;
    if (digit.in_countdown) {
      return element.key == key && (element.countdown ^ countdown) >> known == 0;
    }
    return (uint64_t{element.key ^ key} >> known) == 0;
  }

  // Fixes a digit. `bin` holds the k-th element; `above` elements lie in higher bins, `inside` in
  // this one.
  EMP_FAST_HD void fix(const Digit& digit, unsigned bin, uint64_t above, uint64_t inside) {
    remaining -= above;
    if (digit.in_countdown) {
      countdown |= uint64_t{bin} << digit.shift;
    } else {
      key |= bin << digit.shift;
    }
    // The whole bin is taken, so zeros in the lower digits give a lower bound.
    if (inside == remaining) status = SelectStatus::kFound;
  }

  EMP_FAST_HD bool takes(const Element& element) const {
    return status != SelectStatus::kNothing &&
           (element.key > key || (element.key == key && element.countdown >= countdown));
  }
};

}  // namespace emp_fast::cuda
