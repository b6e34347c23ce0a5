#include "simt/warpgroup.h"

#include <algorithm>
#include <cstring>

#include "simt/shared_memory.h"

namespace warpform::simt {
namespace {

constexpr int kThreads = kLanes * kWarpgroupWarps;  // of a warpgroup
constexpr int kRegisters = 65536;                   // of a multiprocessor, which the block has alone

int registers[kMaxWarpgroups];  // a thread
int wanted[kMaxWarpgroups];     // by those that wait, else 0
int free_registers;

// Lets go on whom there are registers for.
void serve() {
  for (int g = 0; g < kMaxWarpgroups; ++g) {
    const int more = (wanted[g] - registers[g]) * kThreads;
    if (wanted[g] == 0 || more > free_registers) continue;
    free_registers -= more;
    registers[g] = wanted[g];
    wanted[g] = 0;
    end_warpgroup_meeting(g);
  }
}

std::string count_text(int n) { return std::to_string(n) + " registers a thread"; }

// True in the lane that speaks for the warpgroup.
bool last_of_warpgroup(Meeting meeting, const Where& where) { return meet(meeting, where) && meet_warpgroup(where); }

}  // namespace

void clear_warpgroups(int threads) {
  // What a kernel has on entry: as many as fit the block, for each thread the same.
  const int entry = std::min(kRegisters / threads / 8 * 8, 256);
  free_registers = kRegisters - entry * ((threads + kLanes - 1) / kLanes * kLanes);
  std::fill_n(registers, kMaxWarpgroups, entry);
  std::fill_n(wanted, kMaxWarpgroups, 0);
}

void give_registers(int count, const Where& where) {
  if (!last_of_warpgroup(Meeting::kGiveRegisters, where)) return;
  const int g = this_warpgroup();
  if (count > registers[g]) {
    fail("give_registers: the warpgroup has " + count_text(registers[g]) + " and cannot come down to " +
             std::to_string(count),
         where);
  }
  free_registers += (registers[g] - count) * kThreads;
  registers[g] = count;
  end_warpgroup_meeting(g);
  serve();
}

void take_registers(int count, const Where& where) {
  if (!last_of_warpgroup(Meeting::kTakeRegisters, where)) return;
  const int g = this_warpgroup();
  if (count < registers[g]) {
    fail("take_registers: the warpgroup has " + count_text(registers[g]) + " and cannot come up to " +
             std::to_string(count),
         where);
  }
  wanted[g] = count;
  serve();
  if (wanted[g] != 0) suspend();
}

std::string waiting_warpgroup_text(int w) {
  const int g = w / kWarpgroupWarps;
  if (wanted[g] != 0) {
    return " (wants " + count_text(wanted[g]) + ", has " + std::to_string(registers[g]) + ", and " +
           std::to_string(free_registers) + " are free for its " + std::to_string(kThreads) + " threads)";
  }
  int come = 0;
  for (int i = 0; i < kWarpgroupWarps; ++i) come += block.warp[g * kWarpgroupWarps + i].at_warpgroup;
  return " (" + std::to_string(come) + " of " + std::to_string(kWarpgroupWarps) + " warps came)";
}

bool elect(const Where& where) {
  Warp& warp = this_warp();
  if (meet(Meeting::kElect, where)) end_meeting(warp);
  return this_lane() == static_cast<int>(fixed_draw(kLanes, static_cast<uint32_t>(warp_number(warp))));
}

void stmatrix(uint32_t row, const uint32_t* r, bool transposed, const Where& where) {
  struct Operands {
    const uint32_t* r;
    uint32_t row;
  };
  Warp& warp = this_warp();
  Operands mine{r, row};
  warp.operands[this_lane()] = &mine;
  if (!meet(transposed ? Meeting::kStmatrixTrans : Meeting::kStmatrix, where)) return;
  for (int tile = 0; tile < 4; ++tile) {
    alignas(16) uint16_t m[8][8];
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t in = static_cast<const Operands*>(warp.operands[l])->r[tile];
      if (transposed) {
        m[l % 4 * 2][l / 4] = static_cast<uint16_t>(in);
        m[l % 4 * 2 + 1][l / 4] = static_cast<uint16_t>(in >> 16);
      } else {
        std::memcpy(&m[l / 4][l % 4 * 2], &in, 4);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const int lane = tile * 8 + i;
      store_shared_row(static_cast<const Operands*>(warp.operands[lane])->row, lane, m[i], where);
    }
  }
  end_meeting(warp);
}

}  // namespace warpform::simt
