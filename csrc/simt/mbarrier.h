// Barriers in shared memory that count arrivals and bytes (kernels/device/mbarrier.cuh). Each hands on what those who
// arrived knew, and the copies that completed on it, to those who wait for it.
#pragma once

#include <string>

#include "simt/scheduler.h"

namespace warpform::simt {

void clear_mbarriers();

void init_mbarrier(uint32_t address, int arrivals, const Where& where);
void fence_mbarrier_inits();
void arrive_at_mbarrier(uint32_t address, int expected_bytes, const Where& where);
void wait_for_mbarrier(uint32_t address, uint32_t parity, const Where& where);

// A bulk copy by the running thread will complete on the barrier at this address: its number.
int mbarrier_of_copy(uint32_t address, const Where& where);
// The copy has landed. Its issuer speaks, `where` it issued the copy.
void complete_on_mbarrier(int number, int bytes, const Where& where);
// After a block: some thread must have waited for every copy.
void check_copies_waited_for();

// What a barrier lacks, for reports of deadlocks.
std::string mbarrier_text(int number);

}  // namespace warpform::simt
