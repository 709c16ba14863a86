// Races between threads, and accesses to memory that is not a kernel's.
#pragma once
#include <stdint.h>

namespace check {

// A tensor that kernels may use. `overlapping`: a block may read what another one writes, since it drops it.
void add_tensor(const char *name, void *address, uint64_t bytes, bool writable, bool overlapping);
// The library whose constants may be read.
void set_library(const void *symbol);

// Says what was found in one line and ends the process.
[[noreturn]] __attribute__((format(printf, 2, 3))) void finding(const char *kind, const char *format, ...);

// `overlaps`: a kernel may start before those have ended that were launched since the last one that may not.
void launch_starts(bool overlaps);
void block_starts(unsigned shared_bytes);
void block_ends();
// The thread waits for all kernels before.
void await_last();

// What any of these threads did before is now before what any of them does.
void all_synchronise();
void synchronise(const unsigned *members, unsigned count);

// Where an access comes from: a line of the text, or a place in the library.
struct Site {
  uint32_t coded;
  static Site line(int number) { return {0x80000000u | (uint32_t)number}; }
};

void access(uintptr_t address, unsigned bytes, bool write, Site site);
// Looks at what the last access wrote if it was not ordered with another: harmless if it changed nothing.
void settle();

// An asynchronous copy to shared memory begins or ends; in between nobody may touch the target.
void copy_starts(uintptr_t address, unsigned bytes, Site site);
void copy_ends(uintptr_t address, unsigned bytes, Site site);

// wgmma reads an element on behalf of `thread`: in between nobody may write it.
void wgmma_starts(uintptr_t address, unsigned thread, Site site);
void wgmma_ends(uintptr_t address, unsigned thread, Site site);
void proxy_fence();

bool is_shared(uintptr_t address, unsigned bytes);

}  // namespace check
