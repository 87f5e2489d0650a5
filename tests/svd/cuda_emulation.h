// Runs kernels of kernels/*.cu on the CPU, to the letter of their index arithmetic.
//
// Every CUDA thread is a fiber (POSIX ucontext to start it, then jumps, which make no system calls)
// that runs until it waits at a barrier. A warp runs until it waits for another, a block until it
// waits for its cluster, in ascending or descending order: a barrier that is missing shows as a wrong
// result in one of the two. Shared memory is NaN before and after its block, and so are its bounds,
// which are checked.
#pragma once
#undef _FORTIFY_SOURCE  // whose longjmp does not leave one stack for another
#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __cluster_dims__(x, y, z)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  Index thread, block;
  unsigned rank;
  bool done = false;
};

constexpr size_t STACK = 64 * 1024, GUARD = 64;

inline ucontext_t origin;
inline jmp_buf scheduler;
inline Fiber* running;
inline std::function<void()> body;
inline std::vector<std::vector<double>> memory;  // of each block of the cluster, with a guard
inline std::vector<double> exchange;             // a value for each thread of the cluster
inline std::vector<Barrier> blocks, warps;
inline Barrier cluster;

inline void leave() {
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

inline void enter(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  swapcontext(&origin, &fiber.context);
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) leave();
}

inline void start() {
  body();
  running->done = true;
  leave();
}

inline unsigned thread_of_cluster() { return running->rank * blockDim.x + running->thread.x; }

// Runs each of a block's warps until it waits for another, as long as any goes on; returns how many
// threads came to their end.
inline size_t run_block(std::vector<Fiber>& fibers, unsigned rank, bool descending) {
  const unsigned count = blockDim.x / 32;
  size_t ended = 0, before;
  unsigned generation;
  do {
    generation = blocks[rank].generation;
    before = ended;
    for (unsigned w = 0; w < count; ++w) {
      const unsigned warp = rank * count + (descending ? count - 1 - w : w);
      unsigned passed;
      do {
        passed = warps[warp].generation;
        for (unsigned lane = 0; lane < 32; ++lane) {
          Fiber& fiber = fibers[warp * 32 + (descending ? 31 - lane : lane)];
          if (fiber.done) continue;
          threadIdx = fiber.thread;
          blockIdx = fiber.block;
          enter(fiber);
          ended += fiber.done;
        }
      } while (warps[warp].generation != passed);
    }
  } while (blocks[rank].generation != generation || ended != before);
  return ended;
}

// Returns whether the kernel kept within its shared memory and all its threads came to their end.
inline bool launch(unsigned grid, unsigned threads, size_t shared, unsigned cluster_size,
                   bool descending, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim.x = grid;
  blockDim.x = threads;
  bool intact = true;
  for (unsigned first = 0; first < grid; first += cluster_size) {
    memory.assign(cluster_size, std::vector<double>(shared / 8 + 1 + GUARD));
    for (auto& block : memory) std::memset(block.data(), 0xff, block.size() * 8);
    exchange.assign(cluster_size * threads, 0);
    blocks.assign(cluster_size, Barrier{threads});
    warps.assign(cluster_size * threads / 32, Barrier{32});
    cluster = Barrier{cluster_size * threads};
    std::vector<Fiber> fibers(cluster_size * threads);
    for (unsigned k = 0; k < fibers.size(); ++k) {
      Fiber& fiber = fibers[k];
      fiber.stack.reset(new char[STACK]);
      fiber.rank = k / threads;
      fiber.thread.x = k % threads;
      fiber.block.x = first + fiber.rank;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, start, 0);
    }
    std::vector<size_t> left(cluster_size, threads);
    unsigned generation;
    do {
      generation = cluster.generation;
      for (unsigned r = 0; r < cluster_size; ++r) {
        const unsigned rank = descending ? cluster_size - 1 - r : r;
        left[rank] -= run_block(fibers, rank, descending);
        // Shared memory goes with its block.
        if (!left[rank]) std::memset(memory[rank].data(), 0xff, shared);
      }
    } while (cluster.generation != generation);
    for (size_t threads_left : left) intact = intact && threads_left == 0;
    for (auto& block : memory) {
      const auto* bytes = reinterpret_cast<unsigned char*>(block.data());
      for (size_t k = shared; k < block.size() * 8; ++k) intact = intact && bytes[k] == 0xff;
    }
  }
  return intact;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::blocks[emulation::running->rank]); }

template <typename T>
T from_lane(T value, int lane) {
  const unsigned own = emulation::thread_of_cluster();
  auto& warp = emulation::warps[own / 32];
  emulation::exchange[own] = value;
  emulation::wait(warp);
  const T other = static_cast<T>(emulation::exchange[own ^ lane]);
  emulation::wait(warp);
  return other;
}

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulation::memory[emulation::running->rank].data());
}

inline void synchronise_cluster() { emulation::wait(emulation::cluster); }

template <typename T>
T read_from(const T* shared, int rank) {
  const auto place = reinterpret_cast<const unsigned char*>(shared) - shared_memory();
  const auto* block = reinterpret_cast<unsigned char*>(emulation::memory[rank].data());
  return *reinterpret_cast<const T*>(block + place);
}
