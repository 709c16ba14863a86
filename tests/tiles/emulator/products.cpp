// Matrix instructions: mma of a warp on registers, wgmma of four warps on shared memory.
#include <string.h>
#include <vector>

#include "check.h"
#include "device.h"
#include "threads.h"

namespace {

using check::Site;
using threads::GROUP;
using threads::WARP;

constexpr int INNER = 16, MOST_COLUMNS = 256;

float widened(uint16_t bits, bool bfloat16) {
  return bfloat16 ? emulated_from_bfloat16(bits) : emulated_from_float16(bits);
}

// The place of a lane's `number`th 16-bit element in a 16 x 16 operand a: quarters of 8 x 8, down first.
int row_of_a(unsigned lane, int number) { return (int)lane / 4 + (number / 2 % 2) * 8; }
int inner_of_a(unsigned lane, int number) { return (int)lane % 4 * 2 + number % 2 + number / 4 * 8; }

struct Mma {
  float *sums;
  const uint32_t *a, *b;
  bool bfloat16;
};

void multiply(void **given, unsigned) {
  float a[16][INNER], b[INNER][8];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Mma &mine = *(Mma *)given[lane];
    for (int i = 0; i < 8; ++i)
      a[row_of_a(lane, i)][inner_of_a(lane, i)] = widened(((const uint16_t *)mine.a)[i], mine.bfloat16);
    for (int i = 0; i < 4; ++i)
      b[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = widened(((const uint16_t *)mine.b)[i], mine.bfloat16);
  }
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < INNER; ++k) sum += a[row][k] * b[k][column];
      ((Mma *)given[lane])->sums[i] += sum;
    }
}

// A matrix in shared memory of rows (of a, or columns of b) x 16 inner elements, as a descriptor says.
//
// The 16-byte chunks of an atom are those that one swizzle mixes: 8, 4, 2 or 1 of them side by side, 8 times below each
// other. Where the inner index is contiguous, atoms lie `stride` apart along the rows; without a swizzle the second
// chunk of the inner index is `leading` away. Where rows are contiguous, atoms lie `stride` apart along the inner index
// and `leading` along the rows; without a swizzle it is the other way round. A swizzle flips the chunk's bits of an
// address by those of its 128-byte line.
struct Operand {
  uint32_t start, leading, stride;
  int swizzle;  // 0: none, else the base-2 logarithm of the chunks side by side
  bool rows_contiguous;

  Operand(uint64_t descriptor, bool turned) {
    static const int logarithms[] = {0, 3, 2, 1};
    start = (uint32_t)(descriptor & 0x3fff) << 4;
    leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    swizzle = logarithms[descriptor >> 62];
    rows_contiguous = turned;
  }

  uint32_t offset(int row, int inner) const {
    const int along = rows_contiguous ? row : inner, across = rows_contiguous ? inner : row;
    const int chunk = along / 8, side_by_side = 1 << swizzle;
    uint32_t at = start + (uint32_t)(along % 8 * 2 + across % 8 * 16 * side_by_side);
    if (!swizzle) at += (uint32_t)chunk * (rows_contiguous ? stride : leading);
    else at += (uint32_t)(chunk % side_by_side) * 16 + (uint32_t)(chunk / side_by_side) * leading;
    at += (uint32_t)(across / 8) * (!swizzle && rows_contiguous ? leading : stride);
    return at ^ ((at >> 7 & (uint32_t)(side_by_side - 1)) << 4);
  }

  uintptr_t address(int row, int inner) const { return (uintptr_t)emulated_shared + offset(row, inner); }
};

struct Wgmma {
  EmulatedWgmma of[GROUP];
  int line;
  bool done;
};

// The instructions of one warpgroup, oldest first, since the block began.
std::vector<Wgmma> issued[threads::MOST / GROUP];
// For each thread: how many instructions there are up to the end of each of its groups, and up to where it waited.
std::vector<size_t> ends[threads::MOST];
size_t waited_for[threads::MOST];

template <typename Function> void each_element(const Wgmma &one, unsigned warp, Function function) {
  const EmulatedWgmma &given = one.of[0];
  const Operand a(given.descriptor_a, given.turned_a), b(given.descriptor_b, given.turned_b);
  for (int k = 0; k < INNER; ++k) {
    for (unsigned row = 16 * warp; !given.a && row < 16 * warp + 16; ++row) function(a.address((int)row, k));
    for (int column = 0; column < given.columns; ++column) function(b.address(column, k));
  }
}

void perform(Wgmma &one) {
  static float a[64][INNER], b[MOST_COLUMNS][INNER];
  const EmulatedWgmma &given = one.of[0];
  const Operand in_a(given.descriptor_a, given.turned_a), in_b(given.descriptor_b, given.turned_b);
  for (int k = 0; k < INNER; ++k) {
    for (int row = 0; !given.a && row < 64; ++row)
      a[row][k] = widened(*(uint16_t *)in_a.address(row, k), given.bfloat16);
    for (int column = 0; column < given.columns; ++column)
      b[column][k] = widened(*(uint16_t *)in_b.address(column, k), given.bfloat16);
  }
  for (unsigned thread = 0; given.a && thread < GROUP; ++thread)
    for (int i = 0; i < 8; ++i)
      a[thread / WARP * 16 + (unsigned)row_of_a(thread % WARP, i)][inner_of_a(thread % WARP, i)] =
          widened(((const uint16_t *)one.of[thread].a)[i], given.bfloat16);
  for (unsigned thread = 0; thread < GROUP; ++thread)
    for (int i = 0; i < given.columns / 2; ++i) {
      const unsigned row = thread / WARP * 16 + thread % WARP / 4 + i / 2 % 2 * 8;
      const unsigned column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < INNER; ++k) sum += a[row][k] * b[column][k];
      float &total = one.of[thread].sums[i];
      total = (given.accumulate ? total : 0) + (given.negate ? -sum : sum);
    }
  one.done = true;
}

struct Issued {
  const EmulatedWgmma *given;
  int line;
};

void issue(void **given, unsigned first) {
  Wgmma one = {{}, ((Issued *)given[0])->line, false};
  for (unsigned thread = 0; thread < GROUP; ++thread) {
    one.of[thread] = *((Issued *)given[thread])->given;
    const EmulatedWgmma &mine = one.of[thread], &other = one.of[0];
    if (mine.descriptor_a != other.descriptor_a || mine.descriptor_b != other.descriptor_b ||
        mine.accumulate != other.accumulate)
      check::finding("divergence", "threads %u and %u give wgmma at @line %d different operands", first,
                     first + thread, one.line);
  }
  for (unsigned warp = 0; warp < 4; ++warp)
    each_element(one, warp, [&](uintptr_t address) {
      check::wgmma_starts(address, first + warp * WARP, Site::line(one.line));
    });
  if (!threads::late) perform(one);
  issued[first / GROUP].push_back(one);
}

}  // namespace

extern "C" {

void emulated_mma(float *sums, const uint32_t *a, const uint32_t *b, bool bfloat16, int line) {
  Mma mine = {sums, a, b, bfloat16};
  threads::meet("mma", line, threads::current / WARP * WARP, WARP, ~0u, &mine, multiply);
}

uint64_t emulated_shared_offset(const void *address, int line) {
  if (!check::is_shared((uintptr_t)address, 16))
    check::finding("invalid access", "thread %u describes a matrix that is not in shared memory at @line %d",
                   threads::current, line);
  return (uintptr_t)address - (uintptr_t)emulated_shared;
}

void emulated_wgmma(const EmulatedWgmma *given, int line) {
  Issued mine = {given, line};
  threads::meet("wgmma", line, threads::current / GROUP * GROUP, GROUP, 0, &mine, issue);
}

void emulated_wgmma_commit() { ends[threads::current].push_back(issued[threads::current / GROUP].size()); }

void emulated_wgmma_wait(unsigned left) {
  const unsigned thread = threads::current;
  std::vector<size_t> &groups = ends[thread];
  if (groups.size() <= left) return;
  const size_t until = groups[groups.size() - left - 1];
  for (size_t &at = waited_for[thread]; at < until; ++at) {
    Wgmma &one = issued[thread / GROUP][at];
    if (!one.done) perform(one);
    if (thread % WARP) continue;
    each_element(one, thread % GROUP / WARP, [&](uintptr_t address) {
      check::wgmma_ends(address, thread, Site::line(one.line));
    });
  }
}

void emulated_wgmmas_begin() {
  for (auto &list : issued) list.clear();
  for (auto &list : ends) list.clear();
  memset(waited_for, 0, sizeof waited_for);
}
}
