// The shared memory of the running block: filled with garbage at the start, every byte known as written or not, and
// every access compared with those of other threads that no barrier orders before it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/scheduler.h"

namespace warpform::simt {

// The place of a block's arena in the 32-bit address space of shared memory; not 0, so that an address computed without
// shared_base() is caught.
constexpr uint32_t kSharedBase = 1024;

// Before a launch: room for `bytes` a block. Before each block: garbage.
void size_shared(size_t bytes);
void clear_shared();

// kBytes in {2, 4, 8, 16}
template <int kBytes>
void load_shared_bytes(uint32_t address, void* to, const Where& where);
template <int kBytes>
void store_shared_bytes(uint32_t address, const void* from, const Where& where);

// A 16-byte row for ldmatrix, read on behalf of `lane` of the running warp.
const void* shared_row(uint32_t address, int lane, const Where& where);

// The inverse, for stmatrix.
void store_shared_row(uint32_t address, int lane, const void* from, const Where& where);

// An asynchronous copy of 16 bytes is issued, and done by its thread's wait; `from` null writes zeros.
void begin_shared_copy(uint32_t address, const Where& where);
void end_shared_copy(uint32_t address, const void* from, const Where& where);

// 16 bytes of a bulk copy: its thread issues it; it lands at `now`, done by the agent of an mbarrier.
void begin_bulk_copy_to(uint32_t address, const Where& where);
void end_bulk_copy(uint32_t address, const void* from, int agent, Time now, const Where& where);

// 16 bytes that the tensor cores of a warpgroup, an agent, read for a product from now on until its wait. `knows` is what
// all of its warps know.
void begin_product_read(uint32_t address, int agent, const Knowledge& knows, const Where& where);
// The bytes, whenever the product is computed.
const void* product_operand(uint32_t address);

// The running lane has told others of what it stored. What the other lanes of its warp stored since the warp last came to
// a barrier is told by an arrival or a barrier of their own: it counts as stored now.
void postpone_stores_of_other_lanes();

// An mbarrier is initialised: no plain access may touch its 8 bytes.
void claim_mbarrier(uint32_t address, const Where& where);

}  // namespace warpform::simt
