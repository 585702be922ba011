// The emulator's run time: fibers, their scheduler, the memory that they share and who may touch
// it.
#include "emulator/emulator.h"

#include <link.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
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

// What a thread knows of the others, beyond the barriers that it shared with them: every access of
// `thread` before its fence number threads[thread], and of a block's threads before its barrier
// number blocks[block].
struct Knowledge {
  std::unordered_map<uint32_t, uint32_t> threads, blocks;

  bool empty() const { return threads.empty() && blocks.empty(); }
  void add(const Knowledge& other) {
    const auto raise = [](auto& mine, const auto& theirs) {
      for (const auto& [key, value] : theirs) {
        auto& entry = mine[key];
        entry = std::max(entry, value);
      }
    };
    raise(threads, other.threads);
    raise(blocks, other.blocks);
  }
};

struct Record {
  uint32_t tag;  // of the launch, or for shared memory the block: older records mean nothing
  uint32_t thread;
  uint32_t barriers;  // that its block had passed
  uint32_t fences;    // that it had passed
  uint32_t warp_syncs;
  Access access;
};

struct Shadow {
  Record write, read;
};

struct Range {
  uintptr_t begin, end;
  unsigned granule_shift;
  bool writable;
  std::vector<bool> initialised;  // by granule
  std::vector<Shadow> shadow;

  size_t granule(uintptr_t address) const { return (address - begin) >> granule_shift; }
};

constexpr unsigned kSharedGranuleShift = 1;  // no kernel shares bytes

// Shadow memory of one block's shared memory; reused from block to block, told apart by tags.
struct SharedShadow {
  std::vector<Shadow> fixed, dynamic;
};

// ---- the grid

struct Block;

enum class State { kReady, kWarp, kBarrier, kDone };

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
  uint32_t fences, warp_syncs;
  Knowledge acquired, pending;
  std::unique_ptr<Knowledge> published;

  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
};

struct Warp {
  // seen[a][b]: up to which __syncwarp of lane b lane a knows what it did.
  uint32_t seen[32][32];
};

struct Block {
  dim3 index;
  uint32_t number;  // in the grid
  uint32_t tag;
  uint32_t barriers;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::deque<Thread*> ready;
  int waiting;  // at the barrier
  int done;
  bool news;  // some thread has acquired something since the last barrier
  Knowledge known;
  std::vector<char> fixed_memory;  // while another block runs
  std::unique_ptr<char[]> dynamic_memory;
  char* dynamic;  // aligned
  std::unique_ptr<SharedShadow> shadow;
};

struct Grid {
  const Launch* launch;
  uint32_t tag;
  uint32_t threads_per_block;
  std::unordered_map<uintptr_t, Knowledge> published;
  std::vector<std::unique_ptr<Block>> in_flight;
  uint64_t fruitless;  // switches away from a thread that waits for a value
  std::string error;
};

struct Module {
  uintptr_t begin = 0, end = 0;              // its image
  uintptr_t fixed_begin = 0, fixed_end = 0;  // its thread-local memory: __shared__
};

Schedule schedule{0, 1, 0};
Counts count{};
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

constexpr int kSpinsBeforeSwitch = 16;
constexpr uint64_t kMostFruitless = 200000;
const Thread* spinner = nullptr;
uintptr_t spun_at = 0;
int spins = 0;

struct FakeDevice {
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;
};
std::map<int, FakeDevice> devices;

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
  ++count.switches;
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

void finish_thread() {
  Block& block = *running->block;
  running->state = State::kDone;
  ++block.done;
  if (block.waiting > 0) {
    fail("divergent barrier: this thread ends while %d of its block wait at __syncthreads",
         block.waiting);
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

// Whether what `record` tells of comes before what the running thread does now.
bool is_ordered(const Record& record) {
  const Thread& me = *running;
  if (record.thread == me.global) return true;
  const uint32_t block = record.thread / grid->threads_per_block;
  if (block == me.block->number) {
    if (record.barriers < me.block->barriers) return true;
    const uint32_t other = record.thread % grid->threads_per_block;
    if (other / 32 == static_cast<uint32_t>(me.warp())) {
      const Warp& warp = me.block->warps[static_cast<size_t>(me.warp())];
      if (warp.seen[me.lane()][other % 32] > record.warp_syncs) return true;
    }
  }
  const Knowledge* const knows[] = {&me.acquired, &me.block->known};
  for (const Knowledge* k : knows) {
    const auto thread = k->threads.find(record.thread);
    if (thread != k->threads.end() && thread->second > record.fences) return true;
    const auto barriers = k->blocks.find(block);
    if (barriers != k->blocks.end() && barriers->second > record.barriers) return true;
  }
  return false;
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
       before.thread / grid->threads_per_block, before.thread % grid->threads_per_block);
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
  const Record record{
      tag, running->global, running->block->barriers, running->fences, running->warp_syncs, access};
  if (write) {
    shadow.write = record;
  } else if (!(shadow.read.tag == tag && shadow.read.access == Access::kReadOnly)) {
    shadow.read = record;
  }
}

void access_shared(std::vector<Shadow>& shadow, size_t offset, size_t size, bool write,
                   Access access, uintptr_t address) {
  const uint32_t tag = running->block->tag;
  const size_t last = (offset + size - 1) >> kSharedGranuleShift;
  for (size_t g = offset >> kSharedGranuleShift; g <= last; ++g) {
    if (!write && shadow[g].write.tag != tag) {
      fail("read of %zu bytes of shared memory at offset %zu that no thread has written", size,
           offset);
    }
    check_order(shadow[g], write, access, tag, "shared", address);
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
  if (!range.writable) return;
  for (size_t g = range.granule(begin); g <= range.granule(end - 1); ++g) {
    if (write) {
      range.initialised[g] = true;
    } else if (!range.initialised[g]) {
      fail("read of %zu bytes at %#lx that nothing has written", size, address);
    }
    check_order(range.shadow[g], write, access, grid->tag, "global", address);
  }
}

// Every access to memory of the kernel that runs comes through here.
void access(uintptr_t address, size_t size, bool write, Access kind) {
  if (address - reinterpret_cast<uintptr_t>(running->stack) < kStackBytes) return;
  ++count.accesses;
  if (address % std::min<size_t>(size, 16) != 0) {
    fail("misaligned %s of %zu bytes at %#lx", name_of(write, kind), size, address);
  }
  Block& block = *running->block;
  const Module& m = module_memory;
  if (address >= m.fixed_begin && address < m.fixed_end) {
    touched_begin = std::min<uintptr_t>(touched_begin, address & ~uintptr_t{15});
    touched_end = std::max<uintptr_t>(touched_end, address + size);
    return access_shared(block.shadow->fixed, address - m.fixed_begin, size, write, kind, address);
  }
  const auto dynamic = reinterpret_cast<uintptr_t>(block.dynamic);
  const auto dynamic_bytes = static_cast<uintptr_t>(grid->launch->shared_bytes);
  if (address >= dynamic && address < dynamic + dynamic_bytes) {
    if (address + size > dynamic + dynamic_bytes) {
      fail("%s of %zu bytes across the end of dynamic shared memory", name_of(write, kind), size);
    }
    return access_shared(block.shadow->dynamic, address - dynamic, size, write, kind, address);
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

void resize_shadow(std::vector<Shadow>& shadow, size_t bytes) {
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
    thread->global = block->number * threads + t;
    thread->fences = thread->warp_syncs = 0;
    thread->acquired = thread->pending = Knowledge{};
    thread->published.reset();
    *reinterpret_cast<uint64_t*>(thread->stack) = kCanary;
    start_context(thread->context, thread->stack, &enter_thread);
    block->threads.push_back(thread);
    make_ready(thread);
  }
  ++count.launches;
  count.threads += threads;
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
    if (current == nullptr || current->ready.empty() || one_in(schedule.seed == 0 ? 0 : 8)) {
      const size_t from = schedule.seed == 0 ? 0 : random_below(in_flight.size());
      current = nullptr;
      for (size_t i = 0; i < in_flight.size() && current == nullptr; ++i) {
        Block* block = in_flight[(from + i) % in_flight.size()].get();
        if (!block->ready.empty()) current = block;
      }
      if (current == nullptr) {
        grid->error = what_all_wait_for();
        return;
      }
    }
    resume(next_thread(*current));
    if (!grid->error.empty()) return;
    if (current->done == static_cast<int>(current->threads.size())) {
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
  const int64_t most = allowed == opted_in.end() ? 48 * 1024 : std::max(allowed->second, 48 * 1024);
  if (launch.shared_bytes > most) {
    refuse(std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory");
  }
}

}  // namespace

void run(const Launch& launch) {
  check_launch_limits(launch);
  makes_thread_local_memory = 1;
  module_memory = find_module();
  Grid here{};
  here.launch = &launch;
  here.tag = new_tag();
  here.threads_per_block = launch.block.x * launch.block.y * launch.block.z;
  grid = &here;
  touched_begin = UINTPTR_MAX;
  touched_end = 0;
  in_fixed_memory = nullptr;
  run_blocks();
  for (const auto& block : here.in_flight) retire(*block);
  grid = nullptr;
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
    if (published != grid->published.end()) running->pending.add(published->second);
  }
  std::memcpy(out, from, size);
}

void store(void* to, const void* value, size_t size, Access kind) {
  maybe_preempt();
  const auto address = reinterpret_cast<uintptr_t>(to);
  access(address, size, true, kind);
  if (is_strong(kind)) {
    grid->published.erase(address);
    if (running->published) grid->published[address] = *running->published;
  }
  std::memcpy(to, value, size);
}

void store_atomic(void* to, const void* value, size_t size) {
  if (running->published) {
    grid->published[reinterpret_cast<uintptr_t>(to)].add(*running->published);
  }
  std::memcpy(to, value, size);
}

void fence() {
  Thread& me = *running;
  me.acquired.add(me.pending);
  if (!me.pending.empty()) me.block->news = true;
  me.pending = Knowledge{};
  ++me.fences;
  me.published = std::make_unique<Knowledge>(me.acquired);
  me.published->add(me.block->known);
  me.published->threads[me.global] = me.fences;
  me.published->blocks[me.block->number] = me.block->barriers;
}

void block_barrier() {
  Block& block = *running->block;
  if (block.done > 0) {
    fail("divergent barrier: __syncthreads after %d threads of the block have ended", block.done);
  }
  if (++block.waiting < static_cast<int>(block.threads.size())) return wait(State::kBarrier);
  block.waiting = 0;
  ++block.barriers;
  for (Thread* thread : block.threads) {
    if (block.news) block.known.add(thread->acquired);
    if (thread != running) make_ready(thread);
  }
  block.news = false;
  make_ready(running);
  leave();
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
        warp.seen[l][l] = ++block.threads[static_cast<size_t>(first + l)]->warp_syncs;
      }
    }
    uint32_t all[32] = {};
    for (int l = 0; l < 32; ++l) {
      for (int o = 0; o < 32 && (mask >> l & 1); ++o) all[o] = std::max(all[o], warp.seen[l][o]);
    }
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) std::copy(all, all + 32, warp.seen[l]);
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

void set_device(int index, int multiprocessors, int shared_bytes) {
  devices[index] = {multiprocessors, shared_bytes};
}

Counts counts() { return count; }

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
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_bytes;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
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
