// Products of a warpgroup on tensor cores: asynchronous, with operands in shared memory (wgmma, sm_90a).
//
// d[64 x kN] (+)= a[64 x 16] b[16 x kN] with float32 accumulators. Warp w of the warpgroup has rows 16 w to 16 w + 15 of
// d in the layout of mma.sync: d[n][e] is row 16 w + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2.
//
// wgmma_fence(registers) hands registers over to products, wgmma_commit makes a group of the products since the last
// one, and wgmma_wait<n>(registers) waits until at most n groups are under way and takes the registers back. In between
// nothing else may read or write them, accumulators and left operands alike, and nothing may write what the products
// read in shared memory. All four warps make the same calls.
#pragma once

#include <type_traits>

#include "device/tensor_map.cuh"
#include "device/types.cuh"

namespace warpform {

// The dimension along which an operand is contiguous in shared memory: the depth of the product, or the other one.
enum class Major : int { kDepth, kOuter };

// The description of an operand in shared memory. Its rows, as long as the swizzle's span, lie by eights one behind the
// other: eight rows of k128 are 1024 bytes.
//   kDepth   a row is one index of the outer dimension, and along it runs the depth, 64 of it for k128: the address moves
//            on by 32 bytes for the next 16. `stride` is from eight rows to the next eight. Without a swizzle a row is 8
//            of the depth, and `leading` is from there to the next 8.
//   kOuter   a row is one index of the depth, and along it runs the outer dimension, 64 of it for k128. `stride` is from
//            eight rows to the next eight, `leading` from one such span of the outer dimension to the next. Without a
//            swizzle the two change roles: `leading` is from eight rows to the next eight, `stride` from 8 of the outer
//            dimension to the next 8.
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address, int leading, int stride, Swizzle swizzle) {
  const int kind = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<int>(swizzle);
  return uint64_t{(address & 0x3ffff) >> 4} | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(kind) << 62;
}

// ---- registers on their way to a product and back ----

// The compiler may not move an access to these registers across.
template <int kN>
__device__ __forceinline__ void pin_registers(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
  }
}
__device__ __forceinline__ void pin_registers(uint32_t (&a)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[e])::"memory");
}
template <int kN>
__device__ __forceinline__ void pin_registers(uint32_t (&a)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(a[n][e])::"memory");
  }
}

// Accumulators [kN / 8][4] and left operands [4] or [steps][4].
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin_registers(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin_registers(registers), ...);
}

// ---- products ----

// A register list in the instruction's text, and the accumulators of so many columns as its operands.
// clang-format off
#define WARPFORM_LIST_64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WARPFORM_LIST_96 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define WARPFORM_LIST_128 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63"
#define WARPFORM_LIST_176 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87"
#define WARPFORM_LIST_192 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WARPFORM_LIST_256 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WARPFORM_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WARPFORM_D16(n) WARPFORM_D8(n), WARPFORM_D8(n + 1)
#define WARPFORM_D32(n) WARPFORM_D16(n), WARPFORM_D16(n + 2)
#define WARPFORM_D64(n) WARPFORM_D32(n), WARPFORM_D32(n + 4)
#define WARPFORM_DS_64 WARPFORM_D64(0)
#define WARPFORM_DS_96 WARPFORM_D64(0), WARPFORM_D32(8)
#define WARPFORM_DS_128 WARPFORM_D64(0), WARPFORM_D64(8)
#define WARPFORM_DS_176 WARPFORM_DS_128, WARPFORM_D32(16), WARPFORM_D16(20)
#define WARPFORM_DS_192 WARPFORM_DS_128, WARPFORM_D64(16)
#define WARPFORM_DS_256 WARPFORM_DS_192, WARPFORM_D64(24)

// The operands behind the accumulators have the numbers that follow theirs.
#define WARPFORM_WGMMA_SHARED(columns, type, a_, b_, accumulate_, trans_a, trans_b)                                  \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_ ", 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" WARPFORM_LIST_##columns "}, " a_     \
      ", " b_ ", p, 1, 1, " trans_a ", " trans_b ";\n}\n"                                                            \
      : WARPFORM_DS_##columns                                                                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kA == Major::kOuter), "n"(kB == Major::kOuter)        \
      : "memory")
#define WARPFORM_WGMMA_REGISTERS(columns, type, a0, a1, a2, a3, b_, accumulate_, trans_b)                            \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_ ", 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" WARPFORM_LIST_##columns "}, {" a0    \
      ", " a1 ", " a2 ", " a3 "}, " b_ ", p, 1, 1, " trans_b ";\n}\n"                                                \
      : WARPFORM_DS_##columns                                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),                       \
        "n"(kB == Major::kOuter)                                                                                     \
      : "memory")
// clang-format on

// d[64 x kN] = a b, or += where `accumulate`; a and b are wgmma_descriptor of 64 x 16 and kN x 16 elements of T.
template <class T, int kN, Major kA = Major::kDepth, Major kB = Major::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kHalf = std::is_same_v<T, half_t>;
  static_assert(kHalf || std::is_same_v<T, bf16_t>, "wgmma: half_t or bf16_t");
  if constexpr (kN == 64) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(64, "f16", "%32", "%33", "%34", "%35", "%36");
    } else {
      WARPFORM_WGMMA_SHARED(64, "bf16", "%32", "%33", "%34", "%35", "%36");
    }
  } else if constexpr (kN == 96) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(96, "f16", "%48", "%49", "%50", "%51", "%52");
    } else {
      WARPFORM_WGMMA_SHARED(96, "bf16", "%48", "%49", "%50", "%51", "%52");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(128, "f16", "%64", "%65", "%66", "%67", "%68");
    } else {
      WARPFORM_WGMMA_SHARED(128, "bf16", "%64", "%65", "%66", "%67", "%68");
    }
  } else if constexpr (kN == 176) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(176, "f16", "%88", "%89", "%90", "%91", "%92");
    } else {
      WARPFORM_WGMMA_SHARED(176, "bf16", "%88", "%89", "%90", "%91", "%92");
    }
  } else if constexpr (kN == 192) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(192, "f16", "%96", "%97", "%98", "%99", "%100");
    } else {
      WARPFORM_WGMMA_SHARED(192, "bf16", "%96", "%97", "%98", "%99", "%100");
    }
  } else if constexpr (kN == 256) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_SHARED(256, "f16", "%128", "%129", "%130", "%131", "%132");
    } else {
      WARPFORM_WGMMA_SHARED(256, "bf16", "%128", "%129", "%130", "%131", "%132");
    }
  } else {
    static_assert(kN < 0, "wgmma: 64, 96, 128, 176, 192 or 256 columns");
  }
}

// The same with a in registers, in the layout of mma.sync's left operand: a[0] is row lane / 4, columns 2 (lane % 4) and
// + 1, a[1] the same of row + 8, a[2] and a[3] of columns + 8.
template <class T, int kN, Major kB = Major::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr bool kHalf = std::is_same_v<T, half_t>;
  static_assert(kHalf || std::is_same_v<T, bf16_t>, "wgmma: half_t or bf16_t");
  if constexpr (kN == 64) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(64, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    } else {
      WARPFORM_WGMMA_REGISTERS(64, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    }
  } else if constexpr (kN == 96) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(96, "f16", "%48", "%49", "%50", "%51", "%52", "%53", "%54");
    } else {
      WARPFORM_WGMMA_REGISTERS(96, "bf16", "%48", "%49", "%50", "%51", "%52", "%53", "%54");
    }
  } else if constexpr (kN == 128) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(128, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    } else {
      WARPFORM_WGMMA_REGISTERS(128, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    }
  } else if constexpr (kN == 176) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(176, "f16", "%88", "%89", "%90", "%91", "%92", "%93", "%94");
    } else {
      WARPFORM_WGMMA_REGISTERS(176, "bf16", "%88", "%89", "%90", "%91", "%92", "%93", "%94");
    }
  } else if constexpr (kN == 192) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(192, "f16", "%96", "%97", "%98", "%99", "%100", "%101", "%102");
    } else {
      WARPFORM_WGMMA_REGISTERS(192, "bf16", "%96", "%97", "%98", "%99", "%100", "%101", "%102");
    }
  } else if constexpr (kN == 256) {
    if constexpr (kHalf) {
      WARPFORM_WGMMA_REGISTERS(256, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134");
    } else {
      WARPFORM_WGMMA_REGISTERS(256, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134");
    }
  } else {
    static_assert(kN < 0, "wgmma: 64, 96, 128, 176, 192 or 256 columns");
  }
}

#undef WARPFORM_LIST_64
#undef WARPFORM_DS_64
#undef WARPFORM_LIST_96
#undef WARPFORM_DS_96
#undef WARPFORM_LIST_128
#undef WARPFORM_DS_128
#undef WARPFORM_LIST_176
#undef WARPFORM_DS_176
#undef WARPFORM_LIST_192
#undef WARPFORM_DS_192
#undef WARPFORM_LIST_256
#undef WARPFORM_DS_256
#undef WARPFORM_D8
#undef WARPFORM_D16
#undef WARPFORM_D32
#undef WARPFORM_D64
#undef WARPFORM_WGMMA_SHARED
#undef WARPFORM_WGMMA_REGISTERS

}  // namespace warpform
