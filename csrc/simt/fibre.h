// Fibres: stacks that take turns on one OS thread. A CUDA thread of the emulator is one of them.
#pragma once

#include <cstddef>

namespace warpform::simt {

// The saved stack pointer of a fibre that is not running; what it points at belongs to fibre.cpp.
struct Context {
  void* state = nullptr;
};

// Saves the running fibre in `from` and goes on where `to` was saved.
void switch_context(Context& from, const Context& to);

// Makes `context` one that calls entry() on an empty stack when next switched to; entry must not return or throw.
void make_context(Context& context, void* stack, void (*entry)());

// The upper end of a stack of the pool; below each lies a page that cannot be touched, so an overflow ends the process
// at once rather than corrupting a neighbour. Stacks handed back last are handed out first: their pages are warm.
void* take_stack();
void return_stack(void* stack);

}  // namespace warpform::simt
