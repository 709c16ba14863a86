// What the device headers ask of the emulator: C functions, all for the CUDA thread that runs. `line` is where the
// generated text calls.
#pragma once
#include <stdint.h>

extern "C" {

// The shared memory of the block that runs, the most that a block may have.
enum { EMULATED_SHARED = 227 * 1024 };
extern unsigned char emulated_shared[];

// threadIdx, blockIdx, blockDim, gridDim (0..3) along x, y, z (0..2): never changes while a thread runs.
unsigned emulated_index(int which, int axis) __attribute__((const));

// bar.sync `id` for `count` threads, 0: all of the block.
void emulated_barrier(unsigned id, unsigned count, int line);
void emulated_syncwarp(unsigned mask, int line);
// Replaces `bytes` (at most 16) at `value` by those of the lane `source`.
void emulated_shuffle(void *value, unsigned bytes, unsigned source, unsigned mask, int line);
// An access that the compiler did not see.
void emulated_access(const void *address, unsigned bytes, bool write, int line);

// cp.async: without `full` nothing is read and the target becomes zero.
void emulated_copy(void *shared, const void *global, unsigned bytes, bool full, int line);
void emulated_copy_commit();
// Until at most `left` groups are on their way; 0 also takes copies that belong to no group yet.
void emulated_copy_wait(unsigned left);
// All that is still on its way when a thread ends.
void emulated_copies_end();

// ldmatrix of 1, 2 or 4 matrices of 8 x 8 elements of 16 bits.
void emulated_ldmatrix(const void *row, uint32_t *values, unsigned matrices, bool turned, int line);
// mma.m16n8k16 of row-major a and column-major b, float32 sums.
void emulated_mma(float *sums, const uint32_t *a, const uint32_t *b, bool bfloat16, int line);

uint64_t emulated_shared_offset(const void *address, int line);
// wgmma.mma_async.m64nNk16, float32 sums; `a` is null where `descriptor_a` says where it is.
struct EmulatedWgmma {
  uint64_t descriptor_a, descriptor_b;
  const uint32_t *a;
  float *sums;
  int columns;
  bool bfloat16, turned_a, turned_b, accumulate, negate;
};
void emulated_wgmma(const EmulatedWgmma *given, int line);
void emulated_wgmma_commit();
void emulated_wgmma_wait(unsigned left);
// A block begins: none is on its way.
void emulated_wgmmas_begin();
void emulated_fence_proxy_async();

// griddepcontrol.wait
void emulated_await_last();

// The text's kernels announce themselves when their library is loaded.
void emulated_kernel(const char *name, void (*call)(void **parameters));
}
