// Part of selection.cu: what a selection keeps in its workspace. plan_selection places it. Of all
// this only the histograms and the control must be zero before the first kernel.
#pragma once
#include <cstdint>

#include "cuda/plan_selection.h"
#include "cuda/radix_select.h"

namespace emp_fast::cuda {
namespace {

static_assert(sizeof(SelectState) == kStateBytes);

struct Control {
  unsigned long long candidates;  // found inside the bracket; may exceed the capacity
  unsigned long long above;       // scores above the bracket
  unsigned arrived;               // blocks of the running launch; see last_block
  unsigned unused[3];
};
static_assert(sizeof(Control) == kControlBytes);

// The marked scores of a run of tiles, or of all runs before it. A score that ties with the k-th is
// `equal` and not `sure` where the expansion has yet to find out which of these are selected.
struct Total {
  unsigned long long sure, equal;
};
static_assert(sizeof(Total) == kTotalBytes);

struct Workspace {
  unsigned long long* histograms;
  Control* control;
  SelectState* states;
  Total* totals;
  uint32_t* tile_counts;  // of a tile: sure in the lower half, equal in the upper
  uint32_t* bitmap;
  uint32_t* candidate_keys;
  int64_t* candidate_indices;

  Workspace(const SelectionPlan& p, void* memory) {
    char* base = static_cast<char*>(memory);
    histograms = reinterpret_cast<unsigned long long*>(base + p.histograms);
    control = reinterpret_cast<Control*>(base + p.control);
    states = reinterpret_cast<SelectState*>(base + p.states);
    totals = reinterpret_cast<Total*>(base + p.totals);
    tile_counts = reinterpret_cast<uint32_t*>(base + p.tile_counts);
    bitmap = reinterpret_cast<uint32_t*>(base + p.bitmap);
    candidate_keys = reinterpret_cast<uint32_t*>(base + p.candidate_keys);
    candidate_indices = reinterpret_cast<int64_t*>(base + p.candidate_indices);
  }
};

}  // namespace
}  // namespace emp_fast::cuda
