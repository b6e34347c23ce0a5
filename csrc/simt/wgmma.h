// Products of a warpgroup (kernels/device/wgmma.cuh). The descriptions of operands are decoded bit by bit. A product
// reads them at a moment between its issue and the wait that covers it, which the seed draws; accumulators hold garbage
// until that wait.
#pragma once

#include "simt/scheduler.h"

namespace warpform::simt {

void clear_products();

// Registers of one thread, as the kernel names them.
struct RegisterArray {
  const void* data;
  size_t bytes;
};

// One lane's part of a product of 64 x columns x 16.
struct ProductOperands {
  float* d;                     // [columns / 2]
  const uint32_t* registers_a;  // [4], or null: a is a description
  uint64_t a;
  uint64_t b;
  int columns;
  bool half;  // else bfloat16
  bool outer_a;
  bool outer_b;
  bool accumulate;
};

void fence_products(const RegisterArray* arrays, int count, const Where& where);
void issue_product(const ProductOperands& operands, const Where& where);
void commit_products(const Where& where);
void wait_for_products(int groups_left, const RegisterArray* arrays, int count, const Where& where);

// True if the warp has products that none of its waits covered.
bool products_in_flight(int warp);
[[noreturn]] void report_products_in_flight(int warp);

}  // namespace warpform::simt
