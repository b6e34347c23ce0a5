#include "simt/fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

// WARPFORM_SIMT_PORTABLE tries, on any machine, what other processors use.
#if defined(__x86_64__) && !defined(WARPFORM_SIMT_PORTABLE)
#define WARPFORM_SIMT_X86 1
#else
#include <ucontext.h>
#endif

namespace warpform::simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kStacksPerMapping = 64;
// Stacks begin at different places within a page: else the same frame of all threads would fall into the same few sets
// of the first-level cache. 9 cache lines apart, 28 places.
constexpr size_t kColourBytes = 9 * 64;
constexpr size_t kColours = 28;

std::vector<void*>& free_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}

void map_stacks() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t step = kStackBytes + guard;
  void* base = mmap(nullptr, step * kStacksPerMapping, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (base == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of a block");
  for (size_t i = kStacksPerMapping; i-- > 0;) {
    char* low = static_cast<char*>(base) + step * i;
    mprotect(low, guard, PROT_NONE);
    free_stacks().push_back(low + step - i % kColours * kColourBytes);
  }
}

}  // namespace

void* take_stack() {
  auto& stacks = free_stacks();
  if (stacks.empty()) map_stacks();
  void* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

void return_stack(void* stack) { free_stacks().push_back(stack); }

#if defined(WARPFORM_SIMT_X86)

// The registers that a call preserves go on the old stack and come from the new one. A ucontext switch costs 20 times
// this, nearly all of it in a system call for the signal mask. The jump at the end is a return that leaves the
// processor's stack of return addresses alone: that one would predict the wrong fibre's.
asm(R"(
.text
.p2align 4
.type warpform_simt_switch, @function
.hidden warpform_simt_switch
.globl warpform_simt_switch
warpform_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size warpform_simt_switch, .-warpform_simt_switch
)");
extern "C" __attribute__((visibility("hidden"))) void warpform_simt_switch(void** from, void* to);

void switch_context(Context& from, const Context& to) { warpform_simt_switch(&from.state, to.state); }

void make_context(Context& context, void* stack, void (*entry)()) {
  auto* top = static_cast<uint64_t*>(stack);
  // A function is entered with its return address on top, 8 past a multiple of 16: here a null one, which ends
  // backtraces.
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.state = top;
}

#else

namespace {
// A context keeps its ucontext for good: fibres outlive the stacks that they run on.
ucontext_t* ucontext_of(Context& context) {
  if (context.state == nullptr) context.state = new ucontext_t;
  return static_cast<ucontext_t*>(context.state);
}
}  // namespace

void switch_context(Context& from, const Context& to) {
  swapcontext(ucontext_of(from), static_cast<ucontext_t*>(to.state));
}

void make_context(Context& context, void* stack, void (*entry)()) {
  ucontext_t* u = ucontext_of(context);
  getcontext(u);
  constexpr size_t kBytes = kStackBytes - kColours * kColourBytes;
  u->uc_stack.ss_sp = static_cast<char*>(stack) - kBytes;
  u->uc_stack.ss_size = kBytes;
  u->uc_link = nullptr;
  makecontext(u, entry, 0);
}

#endif

}  // namespace warpform::simt
