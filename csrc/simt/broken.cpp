// Kernels with one fault each, and the op that runs them: the emulator's tests say how each must be reported.
#include <torch/csrc/stable/library.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/ptx.cuh"
#include "simt/host.h"
#include "torch/launch.h"

namespace warpform {
namespace {

constexpr int kThreads = 128;
constexpr int kCount = 256;  // values in each buffer
constexpr int kSharedBytes = 4096;

struct BrokenParams {
  const float* in;  // [kCount]
  float* out;       // [kCount]
};

uint32_t slot(int i) { return shared_base() + static_cast<uint32_t>(i) * 4; }
int thread() { return static_cast<int>(threadIdx.x); }

// ---- barriers ----

__global__ void missing_barrier(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  store_shared(slot(t), load_global(p.in + t));
  block_sync();
  const float mine = load_shared<float>(slot(t));
  block_sync();
  store_shared(slot(t), mine + 1);
  // block_sync() is missing here
  store_global(p.out + t, load_shared<float>(slot((t + kWarpSize) % kThreads)));
}

// The next step overwrites what others still read.
__global__ void missing_second_barrier(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  float sum = 0;
  for (int step = 0; step < 4; ++step) {
    store_shared(slot(t), load_global(p.in + t) + static_cast<float>(step));
    block_sync();
    sum += load_shared<float>(slot((t + kWarpSize) % kThreads));
  }
  store_global(p.out + t, sum);
}

__global__ void missing_warp_sync(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  store_shared(slot(t), load_global(p.in + t));
  block_sync();
  store_shared(slot(t), load_global(p.in + t) + 1);
  // A shuffle brings the lanes together, but orders no memory.
  const float other = shuffle_xor(1.0f, 1);
  store_global(p.out + t, other * load_shared<float>(slot(t ^ 1)));
}

__global__ void shared_race(const __grid_constant__ BrokenParams p) {
  store_shared(slot(0), static_cast<float>(thread()));
  block_sync();
  if (thread() == 0) store_global(p.out, load_shared<float>(slot(0)));
}

__global__ void deadlock(const __grid_constant__ BrokenParams p) {
  if (warp_id() == 1) {
    named_barrier_sync(1, 2 * kWarpSize);  // no other warp comes
  } else {
    block_sync();
  }
  store_global(p.out + thread(), 0.0f);
}

// A wait for a barrier that one warp too few tells of its work.
__global__ void missing_arrival(const __grid_constant__ BrokenParams p) {
  if (warp_id() == 0) {
    named_barrier_sync(2, kThreads);
  } else if (warp_id() < 3) {
    named_barrier_arrive(2, kThreads);
  }
  store_global(p.out + thread(), 0.0f);
}

__global__ void divergent_barrier(const __grid_constant__ BrokenParams p) {
  if (lane_id() < 7) {
    block_sync();
  } else {
    block_sync();
  }
  store_global(p.out + thread(), 0.0f);
}

// ---- asynchronous copies ----

__global__ void early_read(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  if (t < 32) cp_async_16(slot(4 * t), p.in + 4 * t);
  cp_async_commit();
  // cp_async_wait<0>() is missing here
  block_sync();
  store_global(p.out + t, load_shared<float>(slot(t)));
}

// Two groups are in flight; the wait leaves one of them, but both are read.
__global__ void wait_for_too_few(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  for (int stage = 0; stage < 2; ++stage) {
    if (t < 32) cp_async_16(slot(4 * t + stage * 128), p.in + 4 * t + stage * 128);
    cp_async_commit();
  }
  cp_async_wait<1>();
  block_sync();
  store_global(p.out + t, load_shared<float>(slot(t)) + load_shared<float>(slot(t + 128)));
}

__global__ void missing_commit(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  if (t < 32) cp_async_16(slot(4 * t), p.in + 4 * t);
  cp_async_wait<0>();
  block_sync();
  store_global(p.out + t, load_shared<float>(slot(t)));
}

__global__ void wait_without_barrier(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  cp_async_16(slot(4 * t), p.in + 4 * (t % 64));
  cp_async_commit();
  cp_async_wait<0>();
  // block_sync() is missing here: the wait covers this thread's own copies only
  store_global(p.out + t, load_shared<float>(slot(4 * (kThreads - 1 - t))));
}

// The next tile is fetched into a buffer that others still read.
__global__ void copy_into_use(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    if (t < 32) cp_async_16(slot(4 * t), p.in + 4 * t + step * 128);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();
    sum += load_shared<float>(slot(t));
  }
  store_global(p.out + t, sum);
}

// ---- shared memory ----

__global__ void never_written(const __grid_constant__ BrokenParams p) {
  const int t = thread();
  if (t != 77) store_shared(slot(t), load_global(p.in + t));
  block_sync();
  store_global(p.out + t, load_shared<float>(slot(kThreads - 1 - t)));
}

// A tile of 8 rows x 32 columns in rows of 128 bytes, chunk c of row r at c ^ (r % 8); read as if it were c ^ (r % 4).
__global__ void wrong_swizzle(const __grid_constant__ BrokenParams p) {
  const auto chunk = [](int row, int c, int mask) {
    return shared_base() + static_cast<uint32_t>(row * 128 + ((c ^ (row & mask)) * 16));
  };
  const int lane = lane_id();
  if (warp_id() == 0) {
    const Vec<float, 4> v{{1, 2, 3, 4}};
    store_shared(chunk(lane % 8, lane / 8, 7), v);
    warp_sync();
    uint32_t r[4];
    ldmatrix_x4(r, chunk(lane % 8, lane / 8, 3));
    store_global(p.out + lane, static_cast<float>(r[0]));
  }
}

__global__ void shared_out_of_bounds(const __grid_constant__ BrokenParams p) {
  store_shared(slot(thread() + kSharedBytes / 4 - 100), load_global(p.in + thread()));
}

__global__ void shared_misaligned(const __grid_constant__ BrokenParams p) {
  const Vec<float, 4> v{{1, 2, 3, 4}};
  store_shared(slot(4 * thread() + (thread() == 90 ? 1 : 0)), v);
  store_global(p.out + thread(), 0.0f);
}

// ---- global memory ----

__global__ void one_past_the_end(const __grid_constant__ BrokenParams p) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + thread();
  store_global(p.out + i, load_global(p.in + i + 1));
}

__global__ void out_of_bounds_store(const __grid_constant__ BrokenParams p) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + thread();
  store_global(p.out + i * 2, load_global(p.in + i));
}

__global__ void store_before_the_start(const __grid_constant__ BrokenParams p) {
  store_global(p.out + thread() - 1, 0.0f);
}

__global__ void store_to_input(const __grid_constant__ BrokenParams p) {
  store_global(const_cast<float*>(p.in) + thread(), 0.0f);
}

__global__ void misaligned_vector(const __grid_constant__ BrokenParams p) {
  const auto v = load_global(reinterpret_cast<const Vec<float, 4>*>(p.in + (thread() == 33 ? 1 : 0)));
  store_global(p.out + thread(), v[0]);
}

__global__ void atomic_out_of_bounds(const __grid_constant__ BrokenParams p) {
  atomic_add_global(p.out + kCount - kThreads + 1 + thread(), 1.0f);
}

// ---- warp collectives ----

__global__ void divergent_shuffle(const __grid_constant__ BrokenParams p) {
  float v = load_global(p.in + thread());
  if (lane_id() < 16) {
    v = shuffle_xor(v, 1);
  } else {
    v = shuffle_xor(v, 2);
  }
  store_global(p.out + thread(), v);
}

__global__ void shuffle_after_exit(const __grid_constant__ BrokenParams p) {
  if (thread() >= 100) return;
  store_global(p.out + thread(), shuffle_xor(load_global(p.in + thread()), 1));
}

__global__ void shuffle_against_barrier(const __grid_constant__ BrokenParams p) {
  if (lane_id() == 31) block_sync();
  store_global(p.out + thread(), static_cast<float>(ballot(true)));
}

using Run = void (*)(const BrokenParams&);
template <auto kKernel, int kBlocks = 2>
void run(const BrokenParams& p) {
  launch<kKernel>("broken", dim3(kBlocks), kThreads, kSharedBytes, nullptr, p);
}

#define WARPFORM_BROKEN(kernel) {#kernel, run<kernel>}
const std::map<std::string, Run> kKernels = {
    WARPFORM_BROKEN(missing_barrier),
    WARPFORM_BROKEN(missing_second_barrier),
    WARPFORM_BROKEN(missing_warp_sync),
    WARPFORM_BROKEN(shared_race),
    WARPFORM_BROKEN(deadlock),
    WARPFORM_BROKEN(missing_arrival),
    WARPFORM_BROKEN(divergent_barrier),
    WARPFORM_BROKEN(early_read),
    WARPFORM_BROKEN(wait_for_too_few),
    WARPFORM_BROKEN(missing_commit),
    WARPFORM_BROKEN(wait_without_barrier),
    WARPFORM_BROKEN(copy_into_use),
    WARPFORM_BROKEN(never_written),
    WARPFORM_BROKEN(wrong_swizzle),
    WARPFORM_BROKEN(shared_out_of_bounds),
    WARPFORM_BROKEN(shared_misaligned),
    WARPFORM_BROKEN(one_past_the_end),
    WARPFORM_BROKEN(out_of_bounds_store),
    WARPFORM_BROKEN(store_before_the_start),
    WARPFORM_BROKEN(store_to_input),
    WARPFORM_BROKEN(misaligned_vector),
    WARPFORM_BROKEN(atomic_out_of_bounds),
    WARPFORM_BROKEN(divergent_shuffle),
    WARPFORM_BROKEN(shuffle_after_exit),
    WARPFORM_BROKEN(shuffle_against_barrier),
};
#undef WARPFORM_BROKEN

void broken(std::string name) {
  const auto kernel = kKernels.find(name);
  check(kernel != kKernels.end(), "_broken: no kernel is called ", name);
  // Apart, so that one buffer's end is not another's beginning.
  std::vector<float> in(kCount + 64, 1.0f), out(kCount + 64, 0.0f);
  const auto aligned = [](std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data() + 16) + 15) & ~uintptr_t{15});
  };
  const BrokenParams p{aligned(in), aligned(out)};
  struct Launches {
    Launches() { simt::begin_launches("_broken"); }
    ~Launches() { simt::end_launches(); }
  } launches;
  simt::register_memory(p.in, kCount * sizeof(float), /*writable=*/false);
  simt::register_memory(p.out, kCount * sizeof(float), /*writable=*/true);
  kernel->second(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(warpform_simt, m) {
  // Runs a faulty kernel by name; raises the emulator's report.
  m.def("_broken(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(warpform_simt, CompositeExplicitAutograd, m) { m.impl("_broken", TORCH_BOX(&broken)); }

}  // namespace warpform
