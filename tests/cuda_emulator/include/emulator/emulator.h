// Runs CUDA kernels on the host, a fiber a CUDA thread, and watches every access to memory.
//
// The kernels are compiled by g++ with -fsanitize=thread, but linked with emulator.cpp in place of
// the sanitizer's runtime: it is told of every load and store that is not to the thread's own
// registers and stack. So it finds what a GPU does silently: an access outside the tensors that
// Python registered, a misaligned one, a read of memory that nothing wrote, two accesses of
// different threads that nothing orders, a barrier or a warp's collective that some threads never
// reach, an access to what a launch before, which may still run, works on.
//
// Threads run one at a time. They switch at barriers, warp collectives and, with a seed, at random
// accesses; with a seed several blocks are in flight and start in any order.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Launch {
  const char* name;
  dim3 grid, block;
  unsigned cluster;  // blocks along x
  bool early;        // may start while the launch before it is still running
  int64_t shared_bytes;
  const void* kernel;
  const void* call;  // the kernel's arguments: constant memory
  size_t call_bytes;
  void (*run_thread)(const void* call);
};

// Throws std::runtime_error that says which thread did what, if one did wrong.
void run(const Launch& launch);

// ---- what a kernel asks of it

uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_dim() __attribute__((const));
dim3 grid_dim() __attribute__((const));
void* dynamic_shared() __attribute__((const));

enum class Access {
  kPlain,
  kReadOnly,  // __ldg: the memory must not change while the kernel runs
  kStrong,    // past the first-level cache, or volatile: no race with another of its kind
  kAtomic,
};
void load(void* out, const void* from, size_t size, Access access);
void store(void* to, const void* value, size_t size, Access access);
// The second half of an atomic operation: nothing comes between it and the load before it.
void store_atomic(void* to, const void* value, size_t size);

void fence();                   // __threadfence
bool block_barrier(bool vote);  // whether any thread of the block votes

enum class WarpOp : int { kSync, kShuffle, kVote, kMatch, kReduce };
// Waits for the lanes of `mask`, which must all call the same, and gives each the values of all.
struct WarpValues {
  uint64_t of[32];
};
WarpValues warp_exchange(WarpOp op, unsigned mask, uint64_t value);

// Launches run one after the other. What an early one does before it waits is checked as if all
// that may still be running then ran at the same time; every thread of it must wait.
void let_next_launch_start();
void wait_for_launch_before();

unsigned cluster_rank();
void cluster_barrier();

// Asynchronous copies end as late as the schedule lets them; until then nobody may touch where they
// go.
void mbarrier_init(void* barrier, uint32_t arrivals);
void mbarrier_arrive_expect(void* barrier, uint32_t bytes);
void mbarrier_wait(const void* barrier, uint32_t parity);
// Must come between a thread's own accesses to shared memory and the bulk copies that it starts.
void fence_async();
void bulk_copy(void* shared, const void* global, uint32_t bytes, void* barrier);
// Groups of bulk stores, a thread's own. They read shared memory as late as the thread lets them,
// and until then nobody may touch what they read.
void bulk_store(void* global, const void* shared, uint32_t bytes);
void commit_bulk_stores();
void wait_bulk_stores();
void store_async(void* shared, const void* value, size_t bytes, void* barrier, unsigned rank);
void copy16(void* shared, const void* global);  // cp.async
void commit_copies();
void wait_copies(size_t pending);

int lane();
// Ends the launch with an error that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- what the tests ask of it

struct Schedule {
  uint64_t seed;         // 0: blocks one by one, threads in order
  int blocks_in_flight;  // with a seed
  int preempt_one_in;    // accesses, with a seed
};
void set_schedule(const Schedule& schedule);
// Memory that kernels may touch. `granule`: bytes of its smallest element.
void allow(uintptr_t address, size_t size, size_t granule, bool writable, bool initialised);
void mark_initialised(uintptr_t address, size_t size);
void forget_memory();
// Launches a kernel with fewer blocks than asked, so that those that loop over tiles must do so.
void limit_blocks(const std::string& kernel, unsigned most);
// Makes every launch of that kernel fail; "" makes none fail.
void fail_launches(const std::string& kernel);
// Counts how often launches of that kernel read each word of 4 bytes, until the counts are taken.
void count_reads(const std::string& kernel, uintptr_t address, size_t words);
std::vector<uint32_t> take_reads();
// The device that kernels run on from now on. max_cluster: 0 for one without clusters.
void set_device(int index, int multiprocessors, int shared_bytes, int max_cluster);

}  // namespace emulator
