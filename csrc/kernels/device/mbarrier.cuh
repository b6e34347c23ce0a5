// Barriers in shared memory that count the arrivals of threads and the bytes of bulk copies (mbarrier, sm_90).
//
// A barrier goes through phases. A phase ends when as many threads have arrived as mbarrier_init said and all bytes
// that they announced have landed. Phases have parities 0, 1, 0, ...; who waits for a parity waits for the end of the
// phase of that parity that is under way, or passes if that one was the last to end. So a consumer waits for parity 0
// first, and a producer that has to find a buffer empty waits for parity 1 first, which passes at once.
#pragma once

#include <cstdint>

namespace warpform {

constexpr int kBarrierBytes = 8;  // and its alignment

// One thread initialises a barrier. fence_mbarrier_init, by that thread, and a barrier of the block come before its use.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// What the thread did before is ordered before what others do after their wait.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same, and announces bytes of copies that will complete on the barrier.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra WAIT;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace warpform
