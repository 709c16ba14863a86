// What warps move: sectors of global memory, and rounds of the banks of shared memory.
#pragma once
#include <stdint.h>

#include <string>

namespace traffic {

extern bool counted;

void launch_starts(const std::string &kernel);
void block_ends();

// An access of the thread that runs, from a place of the text; `tensor` is 0 for shared memory.
void access(unsigned tensor, uintptr_t address, unsigned bytes, bool write, uint32_t site);

// Prints a line for each kernel, place, tensor and direction: these, then requests, lanes, bytes, least, taken.
void tell();

}  // namespace traffic
