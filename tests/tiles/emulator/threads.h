// The threads of one block: coroutines that are switched where they wait for each other, in an order by chance.
#pragma once
#include <stdint.h>

#include <vector>

namespace threads {

constexpr unsigned MOST = 1024, WARP = 32, GROUP = 128;

extern unsigned current, count;      // the thread that runs; how many the block has
extern uintptr_t stack_from, stack_to;  // of the thread that runs
extern unsigned block[3], grid[3];

extern bool late;  // asynchronous work is done when it is waited for, else at once

void seed(uint64_t value);
// 0..count - 1 in an order by chance.
std::vector<unsigned> shuffled(unsigned count);
// Runs `kernel(parameters)` on every thread of the block at `block`.
void run(void (*kernel)(void **), void **parameters, unsigned threads);

// Waits until all `members` threads from `first` on that `mask` names have come here with the same `what` and `line`.
// The last one calls `act` with all of their `given`, by their place; who is left out has null.
void meet(const char *what, int line, unsigned first, unsigned members, uint32_t mask, void *given,
          void (*act)(void **given, unsigned first));

// What the thread waits for, for a report.
void wait(const char *what, int line);
void go_on(unsigned thread);

}  // namespace threads
