// The emulator's run time: fibers, their scheduler, the memory that they share and who may touch
// it.
#include "emulator/emulator.h"

#include <link.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulator {
namespace {

// ---- fibers

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kCanary = 0x5AFE57AC5AFE57ACull;

#ifdef __x86_64__
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the registers that a call preserves and the stack pointer; goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void switch_context(Context& from, Context& to) {
  emulator_switch(&from.stack_pointer, to.stack_pointer);
}

void start_context(Context& context, char* stack, void (*entry)()) {
  // At entry to a function the stack pointer is 8 below a multiple of 16.
  auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

void start_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// ---- who has touched what

// What is known of other threads, beyond the barriers that a block shares: every access of thread t
// before its clock warps[t / 32][t % 32] (the clock ticks when it hands knowledge on), and of the
// threads of block b before its barrier number blocks[b].
struct Knowledge {
  std::unordered_map<uint32_t, std::array<uint32_t, 32>> warps;
  std::unordered_map<uint32_t, uint32_t> blocks;

  void add_thread(uint32_t thread, uint32_t clock) {
    uint32_t& known = warps[thread / 32][thread % 32];
    known = std::max(known, clock);
  }
  void add_block(uint32_t block, uint32_t barriers) {
    uint32_t& known = blocks[block];
    known = std::max(known, barriers);
  }
  void add(const Knowledge& other) {
    for (const auto& [warp, clocks] : other.warps) {
      auto& mine = warps[warp];
      for (size_t l = 0; l < 32; ++l) mine[l] = std::max(mine[l], clocks[l]);
    }
    for (const auto& [block, barriers] : other.blocks) add_block(block, barriers);
  }
};

// Knowledge from several places, by the place; what comes later from one includes the earlier.
using Sources = std::map<uintptr_t, std::shared_ptr<const Knowledge>>;

void add_sources(Sources& mine, const Sources& others) {
  for (const auto& [place, knowledge] : others) mine[place] = knowledge;
}

struct Record {
  uint32_t tag;  // of the launch, or for shared memory the block: older records mean nothing
  uint32_t thread;
  uint32_t barriers;  // that its block had passed
  uint32_t clock;
  Access access;
};

struct Shadow {
  Record write, read;
};

struct SharedGranule : Shadow {
  uint32_t filling;  // the tag, while an asynchronous copy is under way to here
  uint32_t fences;   // for asynchronous copies, of the thread that wrote it, before it did
};

constexpr uint32_t kNeedsNoFence = UINT32_MAX;  // written by an asynchronous copy

// The launch that did something last, and the last one of those before it.
struct Latest {
  uint32_t launch, before;  // tags

  void note(uint32_t tag) {
    if (tag == launch) return;
    before = launch;
    launch = tag;
  }
  uint32_t other_than(uint32_t tag) const { return tag == launch ? before : launch; }
};

// A launch that starts early is checked against what those that may still run have done to it,
// however much it does to it itself.
struct GlobalGranule : Shadow {
  Latest written, touched, touched_otherwise;  // the last one other than by atomic operations
};

struct Range {
  uintptr_t begin, end;
  unsigned granule_shift;
  bool writable;
  std::vector<bool> initialised;  // by granule
  std::vector<GlobalGranule> shadow;

  size_t granule(uintptr_t address) const { return (address - begin) >> granule_shift; }
};

constexpr unsigned kSharedGranuleShift = 1;  // no kernel shares bytes

// Shadow memory of one block's shared memory; reused from block to block, told apart by tags.
struct SharedShadow {
  std::vector<SharedGranule> fixed, dynamic;
};

// ---- the grid

struct Block;

enum class State { kReady, kWarp, kBarrier, kCluster, kMbarrier, kDone };

// One thread's copy of 16 bytes.
struct SmallCopy {
  char* to;
  const void* from;
};

// A copy from shared to global memory.
struct BulkStore {
  char* to;
  const char* from;
  size_t bytes;
};

struct Thread {
  Context context;
  char* stack;
  Block* block;
  uint3 index;
  int number;       // in the block
  uint32_t global;  // in the grid
  State state;
  // The collective that it waits in, and then what came of it.
  WarpOp op;
  unsigned mask;
  uint64_t value;
  WarpValues result;
  // Order: see Knowledge.
  uint32_t clock;
  Sources acquired, pending;
  std::shared_ptr<const Knowledge> published;
  const void* awaited;  // the mbarrier that it waits for
  bool unfenced;        // has touched shared memory since its last fence for asynchronous copies
  std::vector<Record> fences;                       // for asynchronous copies
  bool after_launches;                              // every launch before has ended for it
  std::deque<std::vector<SmallCopy>> copy_groups;   // the last one is open
  std::deque<std::vector<BulkStore>> store_groups;  // the last one is open

  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
};

struct Warp {
  uint32_t seen[32][32];  // up to which clock of lane b lane a knows what it did
};

// An mbarrier in shared memory. A phase ends when all have arrived and its bytes have.
struct Mbarrier {
  uint32_t arrivals;  // a phase
  int64_t missing, bytes;
  uint32_t phase;
  Knowledge gathered;                          // of all phases
  std::shared_ptr<const Knowledge> published;  // at the end of the last one
};

struct Block {
  dim3 index;
  uint32_t number;  // in the grid
  uint32_t tag;
  uint32_t barriers;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::deque<Thread*> ready;
  int waiting;   // at the barrier
  bool votes;    // whether one of them has voted
  bool outcome;  // of the last barrier
  int done;
  bool news;  // some thread has acquired something since the last barrier
  Sources known;
  std::unordered_map<const void*, Mbarrier> mbarriers;
  int waiting_for_cluster;
  std::vector<char> fixed_memory;  // while another block runs
  std::unique_ptr<char[]> dynamic_memory;
  char* dynamic;  // aligned
  std::unique_ptr<SharedShadow> shadow;
};

// A copy by the hardware, which ends some time after it was started.
struct AsyncCopy {
  Block* to_block;
  char* to;
  const void* from;  // null: `value`
  size_t bytes;
  char value[16];
  const void* mbarrier;
  Knowledge released;  // what its end makes known
};

struct Grid {
  const Launch* launch;
  uint32_t tag;
  uint32_t threads_per_block;
  uint32_t thread_stride;  // between blocks, in thread numbers: whole warps
  std::unordered_map<uintptr_t, std::shared_ptr<const Knowledge>> published;
  std::deque<AsyncCopy> copies;
  std::vector<std::unique_ptr<Block>> in_flight;
  uint32_t unfinished;  // the tag of the first launch that may still run; its own, if none does
  bool is_overtaken;    // the next launch may start before this one has waited
  bool counts_reads;    // of the memory in `counted`
  uint64_t fruitless;   // switches away from a thread that waits for a value
  std::string error;
};

struct Module {
  uintptr_t begin = 0, end = 0;              // its image
  uintptr_t fixed_begin = 0, fixed_end = 0;  // its thread-local memory: __shared__
};

// What may still run when the next launch starts early: the last launch and, if that let the next
// one start before it had waited for them, those that it found running itself.
struct Unfinished {
  uint32_t tag;
  std::string name;
};

struct CountedReads {
  std::string kernel;
  uintptr_t begin = 0;
  std::vector<uint32_t> words;
};

Schedule schedule{0, 1, 0};
std::vector<Unfinished> unfinished;  // in order
Grid* grid = nullptr;
Thread* running = nullptr;
Block* in_fixed_memory = nullptr;  // whose shared memory lies in the thread-local memory
uintptr_t touched_begin = 0, touched_end = 0;  // of it
Context scheduler;
std::vector<char*> stacks;
std::vector<std::unique_ptr<Thread>> spare_threads;
std::vector<std::unique_ptr<SharedShadow>> spare_shadows;
std::vector<std::unique_ptr<Range>> ranges;  // ordered
Range* last_range = nullptr;
Module module_memory;
uint32_t last_tag = 0;
uint64_t random_state = 1;
std::unordered_map<const void*, int> opted_in;
std::map<std::string, unsigned> most_blocks;  // along x, by kernel
std::string failing_kernel;
CountedReads counted;

constexpr int kSpinsBeforeSwitch = 16;
constexpr uint64_t kMostFruitless = 200000;
const Thread* spinner = nullptr;
uintptr_t spun_at = 0;
int spins = 0;

struct FakeDevice {
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;
  int max_cluster = 8;
};
std::map<int, FakeDevice> devices;
int current_device = 0;

uint64_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 2685821657736338717ull >> 16;
}

uint64_t random_below(uint64_t n) { return random_bits() % n; }

bool one_in(int n) { return n > 0 && random_below(static_cast<uint64_t>(n)) == 0; }

std::string where(const Thread& t) {
  char text[160];
  std::snprintf(text, sizeof(text), "block (%u, %u, %u), thread (%u, %u, %u)", t.block->index.x,
                t.block->index.y, t.block->index.z, t.index.x, t.index.y, t.index.z);
  return text;
}

// ---- switching

void leave() {
  if (*reinterpret_cast<uint64_t*>(running->stack) != kCanary) {
    std::fprintf(stderr, "emulator: a thread of %s overran its stack\n", grid->launch->name);
    std::abort();
  }
  switch_context(running->context, scheduler);
}

void make_ready(Thread* t) {
  t->state = State::kReady;
  t->block->ready.push_back(t);
}

void wait(State state) {
  running->state = state;
  leave();
}

void maybe_preempt() {
  if (!one_in(schedule.preempt_one_in)) return;
  make_ready(running);
  leave();
}

std::vector<Block*> cluster_of(const Block& block);

void finish_thread() {
  Block& block = *running->block;
  if (!running->after_launches) {
    fail("this thread ends without wait_for_launch_before, while %s may still run",
         unfinished.empty() ? "the launch before" : unfinished.back().name.c_str());
  }
  for (const auto& group : running->store_groups) {
    if (!group.empty()) fail("this thread ends before its bulk stores have read shared memory");
  }
  running->state = State::kDone;
  ++block.done;
  if (block.waiting > 0) {
    fail("divergent barrier: this thread ends while %d of its block wait at __syncthreads",
         block.waiting);
  }
  if (grid->launch->cluster > 1) {
    for (const Block* member : cluster_of(block)) {
      if (member->waiting_for_cluster > 0) {
        fail("divergent barrier: this thread ends while others wait for its cluster");
      }
    }
  }
  const int first = running->warp() * 32;
  for (int l = 0; l < 32 && first + l < static_cast<int>(block.threads.size()); ++l) {
    const Thread& other = *block.threads[static_cast<size_t>(first + l)];
    if (other.state == State::kWarp && (other.mask >> running->lane() & 1)) {
      fail("a lane is missing: this thread ends while lane %d waits for it with the mask %08x", l,
           other.mask);
    }
  }
  leave();
}

void enter_thread() {
  grid->launch->run_thread(grid->launch->call);
  finish_thread();
  std::abort();  // nobody switches to a thread that is done
}

char* stack_number(size_t n) {
  while (stacks.size() <= n) {
    constexpr size_t many = 256;
    void* memory = mmap(nullptr, many * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < many; ++i)
      stacks.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  return stacks[n];
}

// ---- memory

Module find_module() {
  Module found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const auto self = reinterpret_cast<uintptr_t>(&find_module);
        uintptr_t begin = UINTPTR_MAX, end = 0;
        size_t fixed = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type == PT_LOAD) {
            begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
            end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
          }
          if (header.p_type == PT_TLS) fixed = header.p_memsz;
        }
        if (self < begin || self >= end) return 0;
        auto& module = *static_cast<Module*>(out);
        module.begin = begin;
        module.end = end;
        module.fixed_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        module.fixed_end = module.fixed_begin + fixed;
        return 1;
      },
      &found);
  return found;
}

thread_local char makes_thread_local_memory;

void use_fixed_memory_of(Block& block) {
  if (in_fixed_memory == &block) return;
  auto* memory = reinterpret_cast<char*>(touched_begin);
  const size_t offset = touched_begin - module_memory.fixed_begin;
  const size_t size = touched_end > touched_begin ? touched_end - touched_begin : 0;
  if (in_fixed_memory != nullptr && size > 0) {
    std::memcpy(in_fixed_memory->fixed_memory.data() + offset, memory, size);
  }
  if (size > 0) std::memcpy(memory, block.fixed_memory.data() + offset, size);
  in_fixed_memory = &block;
}

Range* find_range(uintptr_t address) {
  const auto holds = [address](const Range& r) { return address >= r.begin && address < r.end; };
  if (last_range != nullptr && holds(*last_range)) return last_range;
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address,
                       [](uintptr_t a, const std::unique_ptr<Range>& r) { return a < r->begin; });
  if (after == ranges.begin()) return nullptr;
  Range* range = std::prev(after)->get();
  if (!holds(*range)) return nullptr;
  return last_range = range;
}

bool is_strong(Access access) { return access == Access::kStrong || access == Access::kAtomic; }

bool knows(const Knowledge& k, const Record& record, uint32_t block) {
  const auto warp = k.warps.find(record.thread / 32);
  if (warp != k.warps.end() && warp->second[record.thread % 32] > record.clock) return true;
  const auto barriers = k.blocks.find(block);
  return barriers != k.blocks.end() && barriers->second > record.barriers;
}

// Whether what `record` tells of comes before what the running thread does now.
bool is_ordered(const Record& record) {
  const Thread& me = *running;
  if (record.thread == me.global) return true;
  const uint32_t block = record.thread / grid->thread_stride;
  if (block == me.block->number) {
    if (record.barriers < me.block->barriers) return true;
    const uint32_t other = record.thread % grid->thread_stride;
    if (other / 32 == static_cast<uint32_t>(me.warp())) {
      const Warp& warp = me.block->warps[static_cast<size_t>(me.warp())];
      if (warp.seen[me.lane()][other % 32] > record.clock) return true;
    }
  }
  const auto told = [&](const Sources& sources) {
    return std::any_of(sources.begin(), sources.end(),
                       [&](const auto& source) { return knows(*source.second, record, block); });
  };
  return told(me.acquired) || told(me.block->known);
}

// All that the running thread knows, itself included; its clock ticks.
Knowledge release() {
  Thread& me = *running;
  const Block& block = *me.block;
  ++me.clock;
  Knowledge all;
  for (const auto& [place, knowledge] : me.acquired) all.add(*knowledge);
  for (const auto& [place, knowledge] : block.known) all.add(*knowledge);
  all.add_block(block.number, block.barriers);
  const Warp& warp = block.warps[static_cast<size_t>(me.warp())];
  const uint32_t first = me.global - static_cast<uint32_t>(me.lane());
  for (uint32_t l = 0; l < 32; ++l) all.add_thread(first + l, warp.seen[me.lane()][l]);
  all.add_thread(me.global, me.clock);
  return all;
}

const char* name_of(bool write, Access access) {
  switch (access) {
    case Access::kAtomic:
      return "atomic";
    case Access::kReadOnly:
      return "read-only load";
    default:
      return write ? "write" : "read";
  }
}

[[noreturn]] void fail_race(const Record& before, bool before_write, bool write, Access access,
                            const char* space, uintptr_t address) {
  fail("race on %s memory at %#lx: this %s and the %s of block %u, thread %u are not ordered",
       space, address, name_of(write, access), name_of(before_write, before.access),
       before.thread / grid->thread_stride, before.thread % grid->thread_stride);
}

void check_order(Shadow& shadow, bool write, Access access, uint32_t tag, const char* space,
                 uintptr_t address) {
  const bool strong = is_strong(access);
  const auto conflicts = [&](const Record& r) {
    return r.tag == tag && !(strong && is_strong(r.access)) && !is_ordered(r);
  };
  if (conflicts(shadow.write)) fail_race(shadow.write, true, write, access, space, address);
  if (write && conflicts(shadow.read)) fail_race(shadow.read, false, write, access, space, address);
  // The read-only path may hold stale data whatever the order.
  if (access == Access::kReadOnly && shadow.write.tag == tag) {
    fail("read-only load of %s memory at %#lx that this launch has written", space, address);
  }
  if (write && shadow.read.tag == tag && shadow.read.access == Access::kReadOnly) {
    fail("write to %s memory at %#lx that this launch reads by read-only loads", space, address);
  }
  const Record record{tag, running->global, running->block->barriers, running->clock, access};
  if (write) {
    shadow.write = record;
  } else if (!(shadow.read.tag == tag && shadow.read.access == Access::kReadOnly)) {
    shadow.read = record;
  }
}

void check_shared(SharedGranule& granule, bool write, Access access, uint32_t tag,
                  uintptr_t address) {
  if (granule.filling == tag) {
    fail("%s of shared memory at %#lx, which an asynchronous copy is still filling",
         name_of(write, access), address);
  }
  check_order(granule, write, access, tag, "shared", address);
}

void access_shared(uint32_t tag, std::vector<SharedGranule>& shadow, size_t offset, size_t size,
                   bool write, Access access, uintptr_t address) {
  if (!is_strong(access)) running->unfenced = true;
  const size_t last = (offset + size - 1) >> kSharedGranuleShift;
  for (size_t g = offset >> kSharedGranuleShift; g <= last; ++g) {
    if (!write && shadow[g].write.tag != tag) {
      fail("read of %zu bytes of shared memory at offset %zu that no thread has written", size,
           offset);
    }
    check_shared(shadow[g], write, access, tag, address);
    if (write) shadow[g].fences = static_cast<uint32_t>(running->fences.size());
  }
}

// Until it waits, a launch that starts early may read only what no launch that may still run
// writes, and write only what none of them touches. Strong accesses are no exception, as they may
// find the value from before. Atomic operations are: counters may be added to in any order. What
// those launches write must not be read by read-only loads even later: a compiler may move such a
// load to before the wait.
void check_launches(const GlobalGranule& granule, bool write, Access access, uintptr_t address) {
  const auto running_still = [&](const Latest& latest) -> const char* {
    const uint32_t tag = latest.other_than(grid->tag);
    if (tag < grid->unfinished) return nullptr;
    const auto found = std::find_if(unfinished.begin(), unfinished.end(),
                                    [tag](const Unfinished& u) { return u.tag == tag; });
    return found->name.c_str();
  };
  if (!running->after_launches) {
    const bool atomic = access == Access::kAtomic;
    const bool reads = !write && !atomic;
    const char* other = running_still(reads    ? granule.written
                                      : atomic ? granule.touched_otherwise
                                               : granule.touched);
    if (other != nullptr) {
      fail(
          "race on global memory at %#lx: this %s before wait_for_launch_before and %s of %s are "
          "not ordered",
          address, name_of(write, access), reads ? "a write" : "an access", other);
    }
  }
  if (access != Access::kReadOnly) return;
  if (const char* other = running_still(granule.written)) {
    fail(
        "read-only load of global memory at %#lx that %s has written, beside which this launch "
        "may have started",
        address, other);
  }
}

void count_read(uintptr_t begin, uintptr_t end) {
  const uintptr_t end_of_all = counted.begin + 4 * counted.words.size();
  for (uintptr_t at = std::max(begin, counted.begin); at < std::min(end, end_of_all); at += 4) {
    ++counted.words[(at - counted.begin) / 4];
  }
}

void access_global(Range& range, uintptr_t address, size_t size, bool write, Access access) {
  if (write && !range.writable) fail("write of %zu bytes to an input at %#lx", size, address);
  // A vector that holds one byte of a tensor may be read whole.
  const uintptr_t begin = std::max(address, range.begin);
  const uintptr_t end = std::min(address + size, range.end);
  if (begin != address || end != address + size) {
    const bool whole_vector = !write && size == 16;
    if (!whole_vector) {
      fail("%s of %zu bytes at %#lx, across the end of a tensor", name_of(write, access), size,
           address);
    }
  }
  if (!write && grid->counts_reads) count_read(begin, end);
  if (!range.writable) return;
  for (size_t g = range.granule(begin); g <= range.granule(end - 1); ++g) {
    if (write) {
      range.initialised[g] = true;
    } else if (!range.initialised[g]) {
      fail("read of %zu bytes at %#lx that nothing has written", size, address);
    }
    GlobalGranule& granule = range.shadow[g];
    if (grid->unfinished != grid->tag) check_launches(granule, write, access, address);
    check_order(granule, write, access, grid->tag, "global", address);
    if (write) granule.written.note(grid->tag);
    granule.touched.note(grid->tag);
    if (access != Access::kAtomic) granule.touched_otherwise.note(grid->tag);
  }
}

// Every access to memory of the kernel that runs comes through here.
void access(uintptr_t address, size_t size, bool write, Access kind) {
  if (address - reinterpret_cast<uintptr_t>(running->stack) < kStackBytes) return;
  if (address % std::min<size_t>(size, 16) != 0) {
    fail("misaligned %s of %zu bytes at %#lx", name_of(write, kind), size, address);
  }
  Block& block = *running->block;
  const Module& m = module_memory;
  if (address >= m.fixed_begin && address < m.fixed_end) {
    touched_begin = std::min<uintptr_t>(touched_begin, address & ~uintptr_t{15});
    touched_end = std::max<uintptr_t>(touched_end, address + size);
    return access_shared(block.tag, block.shadow->fixed, address - m.fixed_begin, size, write, kind,
                         address);
  }
  const auto dynamic = reinterpret_cast<uintptr_t>(block.dynamic);
  const auto dynamic_bytes = static_cast<uintptr_t>(grid->launch->shared_bytes);
  if (address >= dynamic && address < dynamic + dynamic_bytes) {
    if (address + size > dynamic + dynamic_bytes) {
      fail("%s of %zu bytes across the end of dynamic shared memory", name_of(write, kind), size);
    }
    return access_shared(block.tag, block.shadow->dynamic, address - dynamic, size, write, kind,
                         address);
  }
  if (!write) {
    const auto call = reinterpret_cast<uintptr_t>(grid->launch->call);
    if (address >= call && address + size <= call + grid->launch->call_bytes) return;
    if (address >= m.begin && address + size <= m.end) return;  // constants
  }
  Range* range = find_range(address);
  if (range == nullptr && !write && size == 16) range = find_range(address + 15);
  if (range == nullptr) {
    fail("%s of %zu bytes at %#lx, outside every tensor", name_of(write, kind), size, address);
  }
  access_global(*range, address, size, write, kind);
}

// Lets the others go on when a thread reads the same place over and over, with no seed as well.
void notice_waiting(uintptr_t address) {
  if (running != spinner || address != spun_at) {
    spinner = running;
    spun_at = address;
    spins = 0;
    return;
  }
  if (++spins < kSpinsBeforeSwitch) return;
  spins = 0;
  if (++grid->fruitless > kMostFruitless) fail("waits for ever for the value at %#lx", address);
  make_ready(running);
  leave();
}

// ---- asynchronous copies

// The shadow of one granule of a block's dynamic shared memory.
SharedGranule& shadow_of(Block& block, const void* shared) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - block.dynamic);
  return block.shadow->dynamic[offset >> kSharedGranuleShift];
}

// Of every granule: that it may be written now, and from now on belongs to a copy.
void start_filling(Block& block, char* to, size_t bytes) {
  if (to < block.dynamic || to + bytes > block.dynamic + grid->launch->shared_bytes) {
    fail("asynchronous copy of %zu bytes to a place that is not in dynamic shared memory", bytes);
  }
  for (size_t at = 0; at < bytes; at += size_t{1} << kSharedGranuleShift) {
    SharedGranule& granule = shadow_of(block, to + at);
    check_shared(granule, true, Access::kPlain, block.tag, reinterpret_cast<uintptr_t>(to + at));
    granule.filling = block.tag;
    granule.fences = kNeedsNoFence;
  }
}

// That whoever wrote this has made it visible to asynchronous copies before the running thread
// starts one: by a fence of its own, as CUTLASS does.
void require_fence(const Block& block, const SharedGranule& granule) {
  if (granule.fences == kNeedsNoFence) return;
  const Thread& writer = *block.threads[granule.write.thread % grid->thread_stride];
  if (granule.fences < writer.fences.size() && is_ordered(writer.fences[granule.fences])) return;
  fail("bulk store of what thread %d has written, without fence.proxy.async in between",
       writer.number);
}

void check_source(const void* from, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  for (size_t at = 0; at < bytes; at += 16) access(address + at, 16, false, Access::kPlain);
}

void end_phase_if_complete(Block& block, const void* place, Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  barrier.published = std::make_shared<Knowledge>(barrier.gathered);
  for (Thread* thread : block.threads) {
    if (thread->state == State::kMbarrier && thread->awaited == place) make_ready(thread);
  }
}

void finish_one_copy() {
  auto& copies = grid->copies;
  if (schedule.seed != 0) std::swap(copies.front(), copies[random_below(copies.size())]);
  const AsyncCopy copy = std::move(copies.front());
  copies.pop_front();
  std::memcpy(copy.to, copy.from == nullptr ? copy.value : copy.from, copy.bytes);
  for (size_t at = 0; at < copy.bytes; at += size_t{1} << kSharedGranuleShift) {
    shadow_of(*copy.to_block, copy.to + at).filling = 0;
  }
  Mbarrier& barrier = copy.to_block->mbarriers.at(copy.mbarrier);
  barrier.bytes -= static_cast<int64_t>(copy.bytes);
  barrier.gathered.add(copy.released);
  end_phase_if_complete(*copy.to_block, copy.mbarrier, barrier);
}

Mbarrier& mbarrier_of(Block& block, const void* place) {
  const auto found = block.mbarriers.find(place);
  if (found == block.mbarriers.end()) fail("use of an mbarrier that nothing has initialised");
  return found->second;
}

unsigned rank_of(const Block& block) { return block.number % grid->launch->cluster; }

std::vector<Block*> cluster_of(const Block& block) {
  std::vector<Block*> members;
  const uint32_t first = block.number - rank_of(block);
  for (const auto& other : grid->in_flight) {
    if (other->number - first < grid->launch->cluster) members.push_back(other.get());
  }
  return members;
}

// An access that the compiler reports.
void plain(void* address, size_t size, bool write) {
  if (running == nullptr) return;  // host code of the same files
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - reinterpret_cast<uintptr_t>(running->stack) < kStackBytes) return;
  maybe_preempt();
  access(at, size, write, Access::kPlain);
}

// ---- running a grid

uint32_t new_tag() {
  if (++last_tag == 0) throw std::runtime_error("emulator: too many launches for one process");
  return last_tag;
}

void resize_shadow(std::vector<SharedGranule>& shadow, size_t bytes) {
  const size_t granules = (bytes >> kSharedGranuleShift) + 9;
  if (shadow.size() < granules) shadow.resize(granules);
}

std::unique_ptr<Block> start_block(uint64_t number, std::vector<size_t>& free_stacks) {
  const Launch& launch = *grid->launch;
  auto block = std::make_unique<Block>();
  block->number = static_cast<uint32_t>(number);
  block->index.x = static_cast<unsigned>(number % launch.grid.x);
  block->index.y = static_cast<unsigned>(number / launch.grid.x % launch.grid.y);
  block->index.z = static_cast<unsigned>(number / launch.grid.x / launch.grid.y);
  block->tag = new_tag();
  block->fixed_memory.resize(module_memory.fixed_end - module_memory.fixed_begin);
  const auto bytes = static_cast<size_t>(launch.shared_bytes);
  block->dynamic_memory.reset(new char[bytes + 1024]);
  block->dynamic = reinterpret_cast<char*>(
      (reinterpret_cast<uintptr_t>(block->dynamic_memory.get()) + 1023) / 1024 * 1024);
  if (spare_shadows.empty()) spare_shadows.push_back(std::make_unique<SharedShadow>());
  block->shadow = std::move(spare_shadows.back());
  spare_shadows.pop_back();
  resize_shadow(block->shadow->fixed, module_memory.fixed_end - module_memory.fixed_begin);
  resize_shadow(block->shadow->dynamic, bytes);

  const uint32_t threads = grid->threads_per_block;
  block->warps.resize((threads + 31) / 32);
  for (uint32_t t = 0; t < threads; ++t) {
    if (spare_threads.empty()) {
      spare_threads.push_back(std::make_unique<Thread>());
      spare_threads.back()->stack = stack_number(free_stacks.size());
      free_stacks.push_back(0);
    }
    Thread* thread = spare_threads.back().release();
    spare_threads.pop_back();
    thread->block = block.get();
    thread->index = {t % launch.block.x, t / launch.block.x % launch.block.y,
                     t / launch.block.x / launch.block.y};
    thread->number = static_cast<int>(t);
    thread->global = block->number * grid->thread_stride + t;
    thread->clock = 0;
    thread->acquired.clear();
    thread->pending.clear();
    thread->published.reset();
    thread->unfenced = false;
    thread->fences.clear();
    thread->after_launches = !launch.early;
    thread->copy_groups.clear();
    thread->copy_groups.emplace_back();
    thread->store_groups.clear();
    thread->store_groups.emplace_back();
    *reinterpret_cast<uint64_t*>(thread->stack) = kCanary;
    start_context(thread->context, thread->stack, &enter_thread);
    block->threads.push_back(thread);
    make_ready(thread);
  }
  return block;
}

void retire(Block& block) {
  if (in_fixed_memory == &block) in_fixed_memory = nullptr;
  for (Thread* thread : block.threads) spare_threads.emplace_back(thread);
  spare_shadows.push_back(std::move(block.shadow));
}

Thread* next_thread(Block& block) {
  if (schedule.seed != 0) {
    std::swap(block.ready.front(), block.ready[random_below(block.ready.size())]);
  }
  Thread* thread = block.ready.front();
  block.ready.pop_front();
  return thread;
}

void resume(Thread* thread) {
  use_fixed_memory_of(*thread->block);
  running = thread;
  switch_context(scheduler, thread->context);
  running = nullptr;
}

std::string what_all_wait_for() {
  std::string text = "no thread can go on:";
  int told = 0;
  for (const auto& block : grid->in_flight) {
    for (const Thread* t : block->threads) {
      if (t->state == State::kDone || ++told > 6) continue;
      char line[120];
      if (t->state == State::kBarrier) {
        std::snprintf(line, sizeof(line), " waits at __syncthreads;");
      } else if (t->state == State::kCluster) {
        std::snprintf(line, sizeof(line), " waits for its cluster;");
      } else if (t->state == State::kMbarrier) {
        std::snprintf(line, sizeof(line), " waits for an mbarrier;");
      } else {
        std::snprintf(line, sizeof(line), " waits in a warp collective with the mask %08x;",
                      t->mask);
      }
      text += " " + where(*t) + line;
    }
  }
  return text;
}

void run_blocks() {
  const Launch& launch = *grid->launch;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t clusters = blocks / launch.cluster;
  std::vector<uint64_t> order;
  if (schedule.seed != 0) {  // clusters start in any order
    order.resize(clusters);
    for (uint64_t c = 0; c < clusters; ++c) {
      order[c] = c;
      std::swap(order[c], order[random_below(c + 1)]);
    }
  }
  const size_t most = std::max<size_t>(
      launch.cluster, schedule.seed == 0 ? 1 : static_cast<size_t>(schedule.blocks_in_flight));
  static std::vector<size_t> made_stacks;
  uint64_t started = 0;
  Block* current = nullptr;
  auto& in_flight = grid->in_flight;
  while (true) {
    while (started < clusters && in_flight.size() + launch.cluster <= most) {
      const uint64_t cluster = order.empty() ? started : order[started];
      for (unsigned rank = 0; rank < launch.cluster; ++rank) {
        in_flight.push_back(start_block(cluster * launch.cluster + rank, made_stacks));
      }
      ++started;
    }
    if (in_flight.empty()) return;
    if (!grid->copies.empty() && one_in(schedule.seed == 0 ? 0 : 8)) finish_one_copy();
    if (current == nullptr || current->ready.empty() || one_in(schedule.seed == 0 ? 0 : 8)) {
      const size_t from = schedule.seed == 0 ? 0 : random_below(in_flight.size());
      current = nullptr;
      for (size_t i = 0; i < in_flight.size() && current == nullptr; ++i) {
        Block* block = in_flight[(from + i) % in_flight.size()].get();
        if (!block->ready.empty()) current = block;
      }
      if (current == nullptr && !grid->copies.empty()) {  // as late as can be
        finish_one_copy();
        continue;
      }
      if (current == nullptr) {
        grid->error = what_all_wait_for();
        return;
      }
    }
    resume(next_thread(*current));
    if (!grid->error.empty()) return;
    if (current->done == static_cast<int>(current->threads.size())) {
      if (std::any_of(grid->copies.begin(), grid->copies.end(),
                      [&](const AsyncCopy& copy) { return copy.to_block == current; })) {
        grid->error = "block " + std::to_string(current->number) +
                      " ends while a copy to its shared memory is under way";
        return;
      }
      const auto at = std::find_if(in_flight.begin(), in_flight.end(),
                                   [&](const auto& block) { return block.get() == current; });
      retire(*current);
      in_flight.erase(at);
      current = nullptr;
    }
  }
}

void check_launch_limits(const Launch& launch) {
  const auto threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string(launch.name) + ": invalid launch: " + why);
  };
  if (threads == 0 || threads > 1024) refuse(std::to_string(threads) + " threads a block");
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) refuse("an empty grid");
  if (launch.grid.y > 65535 || launch.grid.z > 65535) refuse("the grid's y or z exceeds 65535");
  if (launch.cluster == 0 || launch.grid.x % launch.cluster != 0) {
    refuse("the grid is no multiple of the cluster");
  }
  const auto allowed = opted_in.find(launch.kernel);
  // What static shared memory leaves of 48 KiB is not known here: room for the most is kept.
  const int granted = 44 * 1024;
  const int64_t most = allowed == opted_in.end() ? granted : std::max(allowed->second, granted);
  if (launch.shared_bytes > most) {
    refuse(std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory");
  }
}

}  // namespace

void run(const Launch& wanted) {
  if (wanted.name == failing_kernel) {
    throw std::runtime_error(failing_kernel + ": out of memory");
  }
  check_launch_limits(wanted);
  Launch launch = wanted;
  const auto limit = most_blocks.find(launch.name);
  if (limit != most_blocks.end()) launch.grid.x = std::min(launch.grid.x, limit->second);
  makes_thread_local_memory = 1;
  module_memory = find_module();
  Grid here{};
  here.launch = &launch;
  here.tag = new_tag();
  here.threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  here.thread_stride = (here.threads_per_block + 31) / 32 * 32;
  if (!launch.early) unfinished.clear();  // all have ended
  here.unfinished = unfinished.empty() ? here.tag : unfinished.front().tag;
  here.counts_reads = !counted.words.empty() && counted.kernel == launch.name;
  grid = &here;
  touched_begin = UINTPTR_MAX;
  touched_end = 0;
  in_fixed_memory = nullptr;
  // Variables of the host lie between those of the kernels.
  auto* fixed = reinterpret_cast<char*>(module_memory.fixed_begin);
  const std::vector<char> of_host(fixed,
                                  fixed + (module_memory.fixed_end - module_memory.fixed_begin));
  run_blocks();
  std::copy(of_host.begin(), of_host.end(), fixed);
  for (const auto& block : here.in_flight) retire(*block);
  grid = nullptr;
  if (!here.is_overtaken) unfinished.clear();
  unfinished.push_back({here.tag, launch.name});
  if (!here.error.empty()) throw std::runtime_error(std::string(launch.name) + ": " + here.error);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  grid->error = where(*running) + ": " + text;
  while (true) leave();  // the scheduler drops the grid
}

uint3 thread_index() { return running->index; }
uint3 block_index() {
  const dim3& index = running->block->index;
  return {index.x, index.y, index.z};
}
dim3 block_dim() { return grid->launch->block; }
dim3 grid_dim() { return grid->launch->grid; }
void* dynamic_shared() { return running->block->dynamic; }
int lane() { return running->lane(); }

void load(void* out, const void* from, size_t size, Access kind) {
  maybe_preempt();
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (is_strong(kind)) notice_waiting(address);
  access(address, size, false, kind);
  if (kind == Access::kAtomic) access(address, size, true, kind);
  if (is_strong(kind)) {
    const auto published = grid->published.find(address);
    if (published != grid->published.end()) running->pending[address] = published->second;
  }
  std::memcpy(out, from, size);
}

void store(void* to, const void* value, size_t size, Access kind) {
  maybe_preempt();
  const auto address = reinterpret_cast<uintptr_t>(to);
  access(address, size, true, kind);
  if (is_strong(kind)) {
    grid->published.erase(address);
    if (running->published) grid->published[address] = running->published;
  }
  std::memcpy(to, value, size);
}

void store_atomic(void* to, const void* value, size_t size) {
  if (running->published) {  // joins what others have published there
    auto& there = grid->published[reinterpret_cast<uintptr_t>(to)];
    auto joined = std::make_shared<Knowledge>(*running->published);
    if (there) joined->add(*there);
    there = joined;
  }
  std::memcpy(to, value, size);
}

void fence() {
  Thread& me = *running;
  if (!me.pending.empty()) me.block->news = true;
  add_sources(me.acquired, me.pending);
  me.pending.clear();
  me.published = std::make_shared<Knowledge>(release());
}

bool block_barrier(bool vote) {
  Block& block = *running->block;
  if (block.done > 0) {
    fail("divergent barrier: __syncthreads after %d threads of the block have ended", block.done);
  }
  block.votes = block.votes || vote;
  if (++block.waiting < static_cast<int>(block.threads.size())) {
    wait(State::kBarrier);
    return block.outcome;  // of this barrier: none completes the next one before
  }
  block.waiting = 0;
  block.outcome = block.votes;
  block.votes = false;
  ++block.barriers;
  for (Thread* thread : block.threads) {
    if (block.news) add_sources(block.known, thread->acquired);
    if (thread != running) make_ready(thread);
  }
  block.news = false;
  make_ready(running);
  leave();
  return block.outcome;
}

WarpValues warp_exchange(WarpOp op, unsigned mask, uint64_t value) {
  Thread& me = *running;
  Block& block = *me.block;
  if (!(mask >> me.lane() & 1))
    fail("warp collective whose mask %08x leaves its own lane out", mask);
  me.op = op;
  me.mask = mask;
  me.value = value;
  const int first = me.warp() * 32;
  bool complete = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1) || l == me.lane()) continue;
    if (first + l >= static_cast<int>(block.threads.size())) {
      fail("a lane is missing: the mask %08x names lane %d, which the block has not", mask, l);
    }
    const Thread& other = *block.threads[static_cast<size_t>(first + l)];
    if (other.state == State::kDone || other.state == State::kBarrier) {
      fail("a lane is missing: lane %d of the mask %08x %s", l, mask,
           other.state == State::kDone ? "has ended" : "waits at __syncthreads");
    }
    if (other.state != State::kWarp) {
      complete = false;
    } else if (other.op != op || other.mask != mask) {
      fail("lane %d of the mask %08x is in another collective, with the mask %08x", l, mask,
           other.mask);
    }
  }
  if (!complete) {
    wait(State::kWarp);
    return running->result;
  }
  WarpValues values{};
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) values.of[l] = block.threads[static_cast<size_t>(first + l)]->value;
  }
  if (op == WarpOp::kSync) {  // the only one that orders memory
    Warp& warp = block.warps[static_cast<size_t>(me.warp())];
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) {
        warp.seen[l][l] = ++block.threads[static_cast<size_t>(first + l)]->clock;
      }
    }
    Sources acquired;
    uint32_t all[32] = {};
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      for (int o = 0; o < 32; ++o) all[o] = std::max(all[o], warp.seen[l][o]);
      add_sources(acquired, block.threads[static_cast<size_t>(first + l)]->acquired);
    }
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      std::copy(all, all + 32, warp.seen[l]);
      add_sources(block.threads[static_cast<size_t>(first + l)]->acquired, acquired);
    }
  }
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Thread* thread = block.threads[static_cast<size_t>(first + l)];
    thread->result = values;
    make_ready(thread);
  }
  leave();
  return running->result;
}

// ---- launches that start early

void let_next_launch_start() {
  maybe_preempt();
  if (!running->after_launches) grid->is_overtaken = true;
}

void wait_for_launch_before() {
  maybe_preempt();
  running->after_launches = true;
}

// ---- clusters and asynchronous copies

unsigned cluster_rank() { return rank_of(*running->block); }

void cluster_barrier() {
  const std::vector<Block*> members = cluster_of(*running->block);
  ++running->block->waiting_for_cluster;
  size_t waiting = 0;
  for (const Block* block : members) {
    if (block->done > 0)
      fail("cluster barrier after %d threads of a block have ended", block->done);
    waiting += static_cast<size_t>(block->waiting_for_cluster);
  }
  if (waiting < grid->launch->cluster * size_t{grid->threads_per_block}) {
    return wait(State::kCluster);
  }
  Sources sources;
  auto barriers = std::make_shared<Knowledge>();
  for (Block* block : members) {
    block->waiting_for_cluster = 0;
    barriers->add_block(block->number, ++block->barriers);
    add_sources(sources, block->known);
    for (const Thread* thread : block->threads) add_sources(sources, thread->acquired);
  }
  sources[1] = barriers;  // no address
  for (Block* block : members) {
    add_sources(block->known, sources);
    for (Thread* thread : block->threads) {
      if (thread != running) make_ready(thread);
    }
  }
  make_ready(running);
  leave();
}

void mbarrier_init(void* barrier, uint32_t arrivals) {
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  maybe_preempt();
  access(address, 8, true, Access::kPlain);
  Mbarrier& made = running->block->mbarriers[barrier];
  made = Mbarrier{};
  made.arrivals = arrivals;
  made.missing = arrivals;
}

void mbarrier_arrive_expect(void* barrier, uint32_t bytes) {
  maybe_preempt();
  access(reinterpret_cast<uintptr_t>(barrier), 8, false, Access::kAtomic);
  Mbarrier& b = mbarrier_of(*running->block, barrier);
  if (b.missing == 0) fail("more arrivals at an mbarrier than its phase expects");
  b.gathered.add(release());
  b.bytes += bytes;
  --b.missing;
  end_phase_if_complete(*running->block, barrier, b);
}

void mbarrier_wait(const void* barrier, uint32_t parity) {
  maybe_preempt();
  if (parity > 1) fail("an mbarrier's parity is 0 or 1, not %u", parity);
  const auto address = reinterpret_cast<uintptr_t>(barrier);
  access(address, 8, false, Access::kAtomic);
  const Mbarrier& b = mbarrier_of(*running->block, barrier);
  while (b.phase % 2 == parity) {
    running->awaited = barrier;
    wait(State::kMbarrier);
  }
  if (b.published) running->acquired[address] = b.published;
  running->block->news = true;
}

void fence_async() {
  Thread& me = *running;
  me.unfenced = false;
  me.fences.push_back({me.block->tag, me.global, me.block->barriers, me.clock, Access::kPlain});
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, void* barrier) {
  maybe_preempt();
  if (running->unfenced) {
    fail("bulk copy after accesses of this thread to shared memory without fence.proxy.async");
  }
  if (bytes == 0 || bytes % 16 != 0) fail("bulk copy of %u bytes", bytes);
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("bulk copy to a misaligned address");
  check_source(global, bytes);
  access(reinterpret_cast<uintptr_t>(barrier), 8, false, Access::kAtomic);
  mbarrier_of(*running->block, barrier);
  start_filling(*running->block, static_cast<char*>(shared), bytes);
  grid->copies.push_back(
      {running->block, static_cast<char*>(shared), global, bytes, {}, barrier, release()});
}

void bulk_store(void* global, const void* shared, uint32_t bytes) {
  maybe_preempt();
  Thread& me = *running;
  if (bytes == 0 || bytes % 16 != 0) fail("bulk store of %u bytes", bytes);
  auto* to = static_cast<char*>(global);
  const auto* from = static_cast<const char*>(shared);
  if (from < me.block->dynamic || from + bytes > me.block->dynamic + grid->launch->shared_bytes) {
    fail("bulk store of %u bytes from a place that is not in dynamic shared memory", bytes);
  }
  const bool unfenced = me.unfenced;
  for (size_t at = 0; at < bytes; at += 16) {
    access(reinterpret_cast<uintptr_t>(from + at), 16, false, Access::kPlain);
    access(reinterpret_cast<uintptr_t>(to + at), 16, true, Access::kPlain);
  }
  me.unfenced = unfenced;  // those were not this thread's
  for (size_t at = 0; at < bytes; at += size_t{1} << kSharedGranuleShift) {
    SharedGranule& granule = shadow_of(*me.block, from + at);
    require_fence(*me.block, granule);
    granule.filling = me.block->tag;
  }
  me.store_groups.back().push_back({to, from, bytes});
}

void commit_bulk_stores() { running->store_groups.emplace_back(); }

void wait_bulk_stores() {
  Thread& me = *running;
  while (me.store_groups.size() > 1) {
    for (const BulkStore& store : me.store_groups.front()) {
      std::memcpy(store.to, store.from, store.bytes);
      for (size_t at = 0; at < store.bytes; at += size_t{1} << kSharedGranuleShift) {
        shadow_of(*me.block, store.from + at).filling = 0;
      }
    }
    me.store_groups.pop_front();
  }
}

void store_async(void* shared, const void* value, size_t bytes, void* barrier, unsigned rank) {
  maybe_preempt();
  Block& mine = *running->block;
  if (rank >= grid->launch->cluster) fail("the cluster has no block of rank %u", rank);
  Block* target = nullptr;
  for (Block* member : cluster_of(mine)) {
    if (rank_of(*member) == rank) target = member;
  }
  if (target == nullptr) fail("store to the block of rank %u, which has ended", rank);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) fail("store_async to a misaligned address");
  char* to = target->dynamic + (static_cast<char*>(shared) - mine.dynamic);
  char* there = target->dynamic + (static_cast<char*>(barrier) - mine.dynamic);
  mbarrier_of(*target, there);
  check_shared(shadow_of(*target, there), false, Access::kAtomic, target->tag,
               reinterpret_cast<uintptr_t>(there));
  start_filling(*target, to, bytes);
  AsyncCopy copy{target, to, nullptr, bytes, {}, there, release()};
  std::memcpy(copy.value, value, bytes);
  grid->copies.push_back(std::move(copy));
}

void copy16(void* shared, const void* global) {
  maybe_preempt();
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("cp.async to a misaligned address");
  check_source(global, 16);
  start_filling(*running->block, static_cast<char*>(shared), 16);
  running->copy_groups.back().push_back({static_cast<char*>(shared), global});
}

void commit_copies() { running->copy_groups.emplace_back(); }

void wait_copies(size_t pending) {
  Thread& me = *running;
  while (me.copy_groups.size() - 1 > pending) {
    for (const SmallCopy& copy : me.copy_groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
      for (size_t at = 0; at < 16; at += size_t{1} << kSharedGranuleShift) {
        SharedGranule& granule = shadow_of(*me.block, copy.to + at);
        granule.filling = 0;
        granule.fences = static_cast<uint32_t>(me.fences.size());
        granule.write.barriers = me.block->barriers;
        granule.write.clock = me.clock;
      }
    }
    me.copy_groups.pop_front();
  }
}

void set_schedule(const Schedule& wanted) {
  schedule = wanted;
  random_state = wanted.seed * 0x9E3779B97F4A7C15ull + 1;
}

void allow(uintptr_t address, size_t size, size_t granule, bool writable, bool initialised) {
  if (size == 0) return;
  auto range = std::make_unique<Range>();
  range->begin = address;
  range->end = address + size;
  range->writable = writable;
  while (size_t{2} << range->granule_shift <= granule) ++range->granule_shift;
  if (writable) {  // what nobody writes is initialised and has no races
    const size_t granules = range->granule(range->end - 1) + 1;
    range->initialised.assign(granules, initialised);
    range->shadow.resize(granules);
  }
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address,
                       [](uintptr_t a, const std::unique_ptr<Range>& r) { return a < r->begin; });
  if ((after != ranges.end() && (*after)->begin < range->end) ||
      (after != ranges.begin() && (*std::prev(after))->end > range->begin)) {
    throw std::runtime_error("emulator: this memory is allowed already");
  }
  ranges.insert(after, std::move(range));
  last_range = nullptr;
}

void mark_initialised(uintptr_t address, size_t size) {
  if (size == 0) return;
  Range* range = find_range(address);
  if (range == nullptr || !range->writable || address + size > range->end) {
    throw std::runtime_error("emulator: memory outside every output is set");
  }
  for (size_t g = range->granule(address); g <= range->granule(address + size - 1); ++g) {
    range->initialised[g] = true;
  }
}

void forget_memory() {
  ranges.clear();
  last_range = nullptr;
}

void limit_blocks(const std::string& kernel, unsigned most) { most_blocks[kernel] = most; }

void fail_launches(const std::string& kernel) { failing_kernel = kernel; }

void count_reads(const std::string& kernel, uintptr_t address, size_t words) {
  counted = {kernel, address, std::vector<uint32_t>(words)};
}

std::vector<uint32_t> take_reads() { return std::exchange(counted, {}).words; }

void set_device(int index, int multiprocessors, int shared_bytes, int max_cluster) {
  devices[index] = {multiprocessors, shared_bytes, max_cluster};
  current_device = index;
}

}  // namespace emulator

// ---- what g++ -fsanitize=thread calls

#define EMULATOR_HOOKS(size)                                                                \
  extern "C" void __tsan_read##size(void* p) { emulator::plain(p, size, false); }           \
  extern "C" void __tsan_write##size(void* p) { emulator::plain(p, size, true); }           \
  extern "C" void __tsan_unaligned_read##size(void* p) { emulator::plain(p, size, false); } \
  extern "C" void __tsan_unaligned_write##size(void* p) { emulator::plain(p, size, true); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t size) { emulator::plain(p, size, false); }
extern "C" void __tsan_write_range(void* p, size_t size) { emulator::plain(p, size, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}

// ---- what csrc/cuda/runtime.cpp calls

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error"; }

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulator::FakeDevice& d = emulator::devices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = d.max_cluster > 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_bytes;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = cudaFuncAttributes{};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

extern "C" cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void*,
                                                            const cudaLaunchConfig_t*) {
  *size = emulator::devices[emulator::current_device].max_cluster;
  return cudaSuccess;
}

// Few, so that each takes several rows.
extern "C" cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                      const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}

extern "C" cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                            int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emulator::opted_in[function] = value;
  }
  return cudaSuccess;
}

extern "C" cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  emulator::mark_initialised(reinterpret_cast<uintptr_t>(to), size);
  emulator::unfinished.clear();  // it begins after all launches, and the next one after it
  std::memset(to, value, size);
  return cudaSuccess;
}

// ---- what g++ -fsanitize=alignment calls, for an address that is not aligned to its type

extern "C" void __ubsan_handle_type_mismatch_v1(void* where, uintptr_t address) {
  struct Source {
    const char* file;
    uint32_t line, column;
  };
  const auto& source = *static_cast<const Source*>(where);
  if (emulator::running != nullptr) {
    emulator::fail("misaligned access at %#lx, %s:%u", address, source.file, source.line);
  }
}
