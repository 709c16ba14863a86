#include "threads.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <ucontext.h>
#include <vector>

#include "check.h"
#include "runtime.h"

namespace threads {

unsigned current, count, block[3], grid[3];
uintptr_t stack_from, stack_to;
bool late;

namespace {

constexpr size_t STACK = 128 * 1024;

struct Thread {
  jmp_buf at;
  char *stack = nullptr;
  const char *waits_for = nullptr;
  int line = 0;
  bool done = false;
};

struct Meeting {
  const char *what;
  int line;
  unsigned first, members, missing;
  uint32_t mask;
  void *given[GROUP];
};

struct Barrier {
  unsigned needed = 0;
  int line = 0;
  std::vector<unsigned> arrived;
};

Thread all[MOST];
jmp_buf launcher;
ucontext_t starter;
unsigned ready[MOST], ready_count, alive;
uint64_t chance = 1;
std::vector<Meeting> meetings;
Barrier barriers[16];
void (*kernel)(void **);
void **parameters;

unsigned random_below(unsigned most) {
  chance ^= chance << 13;
  chance ^= chance >> 7;
  chance ^= chance << 17;
  return (unsigned)(chance % most);
}

[[noreturn]] void nobody_is_ready() {
  std::string said;
  for (unsigned first = 0; first < count;) {
    unsigned last = first;
    const auto same = [&](unsigned other) {
      return all[other].done == all[first].done && all[other].waits_for == all[first].waits_for &&
             all[other].line == all[first].line;
    };
    while (last + 1 < count && same(last + 1)) ++last;
    said += (said.empty() ? "threads " : ", threads ") + std::to_string(first) + "-" + std::to_string(last);
    if (all[first].done) said += " have ended";
    else said += std::string(" wait in ") + all[first].waits_for + " at @line " + std::to_string(all[first].line);
    first = last + 1;
  }
  check::finding("deadlock", "%s", said.c_str());
}

[[noreturn]] void next() {
  if (!ready_count) {
    if (!alive) _longjmp(launcher, 1);
    nobody_is_ready();
  }
  const unsigned pick = random_below(ready_count);
  current = ready[pick];
  ready[pick] = ready[--ready_count];
  stack_from = (uintptr_t)all[current].stack;
  stack_to = stack_from + STACK;
  _longjmp(all[current].at, 1);
}

// A thread's whole life: one block's work after the other.
void live(int thread) {
  if (!_setjmp(all[thread].at)) _longjmp(launcher, 1);
  for (;;) {
    kernel(parameters);
    check::settle();
    emulated_copies_end();
    all[current].done = true;
    --alive;
    if (!_setjmp(all[current].at)) next();
  }
}

void create(unsigned thread) {
  all[thread].stack = (char *)aligned_alloc(4096, STACK);
  ucontext_t begin;
  getcontext(&begin);
  begin.uc_stack.ss_sp = all[thread].stack;
  begin.uc_stack.ss_size = STACK;
  begin.uc_link = nullptr;
  makecontext(&begin, (void (*)())live, 1, (int)thread);
  if (!_setjmp(launcher)) swapcontext(&starter, &begin);
}

}  // namespace

void seed(uint64_t value) { chance = value * 0x9e3779b97f4a7c15 | 1; }

std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order;
  for (unsigned at = 0; at < count; ++at) order.push_back(at);
  for (unsigned at = count; at > 1; --at) std::swap(order[at - 1], order[random_below(at)]);
  return order;
}

void run(void (*function)(void **), void **given, unsigned threads) {
  kernel = function;
  parameters = given;
  count = alive = ready_count = threads;
  meetings.clear();
  for (Barrier &barrier : barriers) barrier.arrived.clear();
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (!all[thread].stack) create(thread);
    all[thread].done = false;
    all[thread].waits_for = nullptr;
    ready[thread] = thread;
  }
  if (!_setjmp(launcher)) next();
}

void wait(const char *what, int line) {
  all[current].waits_for = what;
  all[current].line = line;
  if (!_setjmp(all[current].at)) next();
  all[current].waits_for = nullptr;
}

void go_on(unsigned thread) { ready[ready_count++] = thread; }

void meet(const char *what, int line, unsigned first, unsigned members, uint32_t mask, void *given,
          void (*act)(void **given, unsigned first)) {
  check::settle();
  size_t at = 0;
  while (at < meetings.size() && !(meetings[at].what == what && meetings[at].line == line &&
                                   meetings[at].first == first && meetings[at].mask == mask)) ++at;
  if (at == meetings.size()) {
    const unsigned named = members == WARP ? (unsigned)__builtin_popcount(mask) : members;
    meetings.push_back({what, line, first, members, named, mask, {}});
  }
  meetings[at].given[current - first] = given;
  if (--meetings[at].missing) return wait(what, line);
  Meeting done = meetings[at];
  meetings.erase(meetings.begin() + (long)at);
  act(done.given, first);
  for (unsigned place = 0; place < members; ++place)
    if (done.given[place] && first + place != current) go_on(first + place);
}

}  // namespace threads

extern "C" {

unsigned emulated_index(int which, int axis) {
  using namespace threads;
  if (which == 0) return axis ? 0 : current;
  if (which == 2) return axis ? 1 : count;
  return which == 1 ? block[axis] : grid[axis];
}

void emulated_barrier(unsigned id, unsigned needed, int line) {
  using namespace threads;
  static const char *const names[16] = {"barrier 0", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5",
                                        "barrier 6", "barrier 7", "barrier 8", "barrier 9", "barrier 10", "barrier 11",
                                        "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  check::settle();
  const bool all = !needed;  // the whole block, whatever its size
  if (all) needed = count;
  if (id > 15 || (!all && (needed % WARP || needed > count)))
    check::finding("invalid barrier", "barrier %u for %u of %u threads at @line %d", id, needed, count, line);
  Barrier &barrier = barriers[id];
  if (barrier.arrived.empty()) barrier.needed = needed, barrier.line = line;
  if (barrier.needed != needed || barrier.line != line)
    check::finding("divergence", "barrier %u for %u threads at @line %d and for %u at @line %d", id, barrier.needed,
                   barrier.line, needed, line);
  barrier.arrived.push_back(current);
  if (barrier.arrived.size() < needed) return wait(names[id], line);
  if (needed == count) check::all_synchronise();
  else check::synchronise(barrier.arrived.data(), needed);
  for (unsigned thread : barrier.arrived)
    if (thread != current) go_on(thread);
  barrier.arrived.clear();
}

void emulated_syncwarp(uint32_t mask, int line) {
  using namespace threads;
  static char here;
  meet("__syncwarp", line, current / WARP * WARP, WARP, mask, &here, [](void **given, unsigned first) {
    unsigned members[WARP], named = 0;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (given[lane]) members[named++] = first + lane;
    check::synchronise(members, named);
  });
}

struct Shuffled {
  char *value;
  unsigned bytes, source;
  int line;
};

void emulated_shuffle(void *value, unsigned bytes, unsigned source, uint32_t mask, int line) {
  using namespace threads;
  Shuffled mine = {(char *)value, bytes, source, line};
  if (!(mask >> current % WARP & 1))
    check::finding("divergence", "thread %u shuffles at @line %d under a mask without it", current, line);
  meet("a shuffle", line, current / WARP * WARP, WARP, mask, &mine, [](void **given, unsigned first) {
    char results[WARP][16];
    for (unsigned lane = 0; lane < WARP; ++lane) {
      const Shuffled *to = (Shuffled *)given[lane], *from = to ? (Shuffled *)given[to->source] : nullptr;
      if (to && !from)
        check::finding("divergence", "thread %u at @line %d shuffles from lane %u, which does not take part",
                       first + lane, to->line, to->source);
      if (to) __builtin_memcpy(results[lane], from->value, to->bytes);
    }
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (const Shuffled *to = (Shuffled *)given[lane]) __builtin_memcpy(to->value, results[lane], to->bytes);
  });
}
}
