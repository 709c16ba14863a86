// cp.async, and ldmatrix of a warp.
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "check.h"
#include "runtime.h"
#include "threads.h"

namespace {

using check::Site;

struct Copy {
  void *to;
  const void *from;  // null: the target becomes zero
  unsigned bytes;
  Site site;
};

// Copies of one thread, oldest first; `ends` says how many there are up to the end of each group.
struct Queue {
  std::vector<Copy> copies;
  std::vector<size_t> ends;
};
Queue queues[threads::MOST];

void perform(const Copy &copy) {
  if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
  else memset(copy.to, 0, copy.bytes);
}

void finish(Queue &queue, size_t copies) {
  for (size_t at = 0; at < copies; ++at) {
    if (threads::late) perform(queue.copies[at]);
    check::copy_ends((uintptr_t)queue.copies[at].to, queue.copies[at].bytes, queue.copies[at].site);
  }
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + (long)copies);
  for (size_t &end : queue.ends) end -= copies;
}

struct Rows {
  const uint16_t *row;
  uint32_t *values;
  unsigned matrices;
  bool turned;
  int line;
};

// Lane 8m + r holds the address of row r of matrix m; lane i gets elements 2(i % 4) and the next of row i / 4.
void load(void **given, unsigned first) {
  const Rows &asked = *(Rows *)given[0];
  uint32_t values[threads::WARP][4];
  const unsigned caller = threads::current;
  for (unsigned lane = 0; lane < 8 * asked.matrices; ++lane) {
    const uintptr_t row = (uintptr_t)((Rows *)given[lane])->row;
    threads::current = first + lane;
    if (!check::is_shared(row, 16))
      check::finding("invalid access", "ldmatrix at @line %d reads no shared memory", asked.line);
    check::access(row, 16, false, Site::line(asked.line));
  }
  threads::current = caller;
  for (unsigned lane = 0; lane < threads::WARP; ++lane)
    for (unsigned matrix = 0; matrix < asked.matrices; ++matrix)
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned across = lane / 4, along = lane % 4 * 2 + half;
        const unsigned row = asked.turned ? along : across, column = asked.turned ? across : along;
        ((uint16_t *)&values[lane][matrix])[half] = ((Rows *)given[8 * matrix + row])->row[column];
      }
  for (unsigned lane = 0; lane < threads::WARP; ++lane)
    memcpy(((Rows *)given[lane])->values, values[lane], 4 * asked.matrices);
}

}  // namespace

extern "C" {

void emulated_copy(void *shared, const void *global, unsigned bytes, bool full, int line) {
  const Site site = Site::line(line);
  if (!check::is_shared((uintptr_t)shared, bytes))
    check::finding("invalid access", "thread %u copies to no shared memory at @line %d", threads::current, line);
  if (full) check::access((uintptr_t)global, bytes, false, site);
  check::copy_starts((uintptr_t)shared, bytes, site);
  const Copy copy = {shared, full ? global : nullptr, bytes, site};
  if (!threads::late) perform(copy);
  queues[threads::current].copies.push_back(copy);
}

void emulated_copy_commit() {
  Queue &queue = queues[threads::current];
  queue.ends.push_back(queue.copies.size());
}

void emulated_copy_wait(unsigned left) {
  Queue &queue = queues[threads::current];
  check::settle();
  if (left == 0) {
    finish(queue, queue.copies.size());
    queue.ends.clear();
  } else if (queue.ends.size() > left) {
    const size_t groups = queue.ends.size() - left;
    finish(queue, queue.ends[groups - 1]);
    queue.ends.erase(queue.ends.begin(), queue.ends.begin() + (long)groups);
  }
}

void emulated_copies_end() { emulated_copy_wait(0); }

void emulated_ldmatrix(const void *row, uint32_t *values, unsigned matrices, bool turned, int line) {
  Rows mine = {(const uint16_t *)row, values, matrices, turned, line};
  threads::meet("ldmatrix", line, threads::current / threads::WARP * threads::WARP, threads::WARP, ~0u, &mine, load);
}
}
