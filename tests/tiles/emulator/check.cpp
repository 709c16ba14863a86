#include "check.h"

#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <unistd.h>
#include <vector>

#include "runtime.h"
#include "threads.h"
#include "traffic.h"

extern "C" {
alignas(1024) unsigned char emulated_shared[EMULATED_SHARED];
}

namespace check {
namespace {

constexpr unsigned CELL = 2;  // bytes: no element is smaller

// One access that others must be ordered with. `clock` counts its thread's synchronisations with parts of the block,
// `epoch` those of whole blocks, and all blocks before: what is of an older epoch of the block is ordered.
struct Access {
  uint32_t epoch, clock;
  Site site;
  uint32_t thread;
};

// `fences`: how many proxy fences the writer had made. `readers`: who read besides `read`, in its epoch.
// `same_writers`: who wrote the value of `write` once more, in epoch `same_epoch`. Both are places in `more`, or 0.
// `first_read`: the epoch of the launch's first read. `copies`, `wgmmas`: on their way.
struct Cell {
  Access write, read;
  uint32_t fences, readers, same_writers, same_epoch, first_read;
  uint16_t copies, wgmmas;
};

struct More {
  Access access;
  uint32_t next;
};

struct Region {
  std::string name;
  uintptr_t from, to;
  bool writable, overlapping;
  Cell *cells;
};

std::vector<Region> regions;  // the first is shared memory
size_t last_region = 0;
std::vector<More> more(1);  // of this epoch
uint32_t epoch = 1, first_epoch = 1, launch_epoch = 1, block_epoch = 1;  // `first`: of launches that overlap
bool overlapping_launch, awaited[threads::MOST];
uint32_t clocks[threads::MOST][threads::MOST];  // [t][u]: which of u's clocks t has seen; [t][t]: t's own
uint32_t fences[threads::MOST], fence_epoch[threads::MOST];
uintptr_t library_from, library_to;

// A write that is not ordered with another access: harmless if it changes nothing.
struct Unordered {
  uintptr_t address;
  Access write, other;
  const char *verb;
  char before[CELL];
};
std::vector<Unordered> unordered;

std::string named(Site site) {
  char text[40];
  if (site.coded >> 31) snprintf(text, sizeof text, "@line %u", site.coded & 0x7fffffff);
  else snprintf(text, sizeof text, "@pc 0x%x", site.coded);
  return text;
}

std::string place(const Region &region, uintptr_t address) {
  return region.name + "+" + std::to_string(address - region.from);
}

bool seen(const Access &access) {
  return access.epoch != epoch || access.thread == threads::current ||
         clocks[threads::current][access.thread] >= access.clock;
}

Region *find(uintptr_t address, unsigned bytes) {
  const auto holds = [&](const Region &region) { return address >= region.from && address + bytes <= region.to; };
  if (last_region < regions.size() && holds(regions[last_region])) return &regions[last_region];
  for (size_t at = 0; at < regions.size(); ++at)
    if (holds(regions[at])) return last_region = at, &regions[at];
  return nullptr;
}

[[noreturn]] void invalid(uintptr_t address, unsigned bytes, bool write, Site site) {
  std::string near = "of no tensor";
  uintptr_t least = 1 << 16;
  for (const Region &region : regions) {
    const uintptr_t before = address < region.from ? region.from - address : 0;
    const uintptr_t past = address + bytes > region.to ? address + bytes - region.to : 0;
    if (before + past >= least) continue;
    least = before + past;
    near = before ? std::to_string(before) + " bytes before " + region.name
                  : std::to_string(past) + " bytes past the end of " + region.name;
  }
  finding("invalid access", "thread %u %s %u bytes, %s, at %s", threads::current, write ? "writes" : "reads", bytes,
          near.c_str(), named(site).c_str());
}

[[noreturn]] void race(const Region &region, uintptr_t address, const char *verb, Site site, const char *other,
                       const Access &access) {
  if (access.epoch < block_epoch)
    finding("race", "thread %u %s %s at %s, which another block %s at %s", threads::current, verb,
            place(region, address).c_str(), named(site).c_str(), other, named(access.site).c_str());
  finding("race", "thread %u %s %s at %s, which thread %u %s at %s, without a barrier between them", threads::current,
          verb, place(region, address).c_str(), named(site).c_str(), access.thread, other, named(access.site).c_str());
}

bool by_another_block(const Region &region, uint32_t when) {
  return &region != &regions[0] && when >= launch_epoch && when < block_epoch;
}

uint32_t chained(Access access, uint32_t next) {
  more.push_back({access, next});
  return (uint32_t)more.size() - 1;
}

// The first of a chain that the thread has not seen, or has seen, or null.
const Access *first_of(uint32_t at, bool wanted) {
  for (; at; at = more[at].next)
    if (seen(more[at].access) == wanted) return &more[at].access;
  return nullptr;
}

uint32_t same_writers(const Cell &cell) { return cell.same_epoch == epoch ? cell.same_writers : 0; }

void read(Region &region, Cell &cell, uintptr_t address, unsigned thread, Site site) {
  if (cell.copies)
    finding("race", "thread %u reads %s at %s, which a copy of thread %u from %s still writes: no wait", thread,
            place(region, address).c_str(), named(site).c_str(), cell.write.thread, named(cell.write.site).c_str());
  if (by_another_block(region, cell.write.epoch) && !region.overlapping)
    race(region, address, "reads", site, "wrote", cell.write);
  if (!seen(cell.write) && !first_of(same_writers(cell), true))
    race(region, address, "reads", site, "wrote", cell.write);
  if (cell.read.epoch != epoch) {
    if (cell.first_read < (&region == &regions[0] ? block_epoch : launch_epoch)) cell.first_read = epoch;
    cell.readers = 0;
  } else if (cell.read.thread != thread) {
    cell.readers = chained(cell.read, cell.readers);
  }
  cell.read = {epoch, clocks[thread][thread], site, thread};
}

void write(Region &region, Cell &cell, uintptr_t address, Site site) {
  if (cell.copies)
    finding("race", "thread %u writes %s at %s, which a copy of thread %u from %s still writes: no wait",
            threads::current, place(region, address).c_str(), named(site).c_str(), cell.write.thread,
            named(cell.write.site).c_str());
  if (cell.wgmmas)
    finding("race", "thread %u writes %s at %s, which a wgmma from %s still reads: no wait", threads::current,
            place(region, address).c_str(), named(site).c_str(), named(cell.read.site).c_str());
  if (by_another_block(region, cell.write.epoch)) race(region, address, "writes", site, "wrote", cell.write);
  if (by_another_block(region, cell.first_read) && !region.overlapping)
    race(region, address, "writes", site, "reads", {cell.first_read, 0, cell.read.site, 0});
  const Access now = {epoch, clocks[threads::current][threads::current], site, threads::current};
  const Access *other = cell.read.epoch != epoch ? nullptr
                        : seen(cell.read)        ? first_of(cell.readers, false)
                                                 : &cell.read;
  const char *verb = other ? "read" : "wrote";
  if (!other) other = seen(cell.write) ? first_of(same_writers(cell), false) : &cell.write;
  if (other) {
    unordered.push_back({address, now, *other, verb, {}});
    memcpy(unordered.back().before, (void *)address, CELL);
    return;
  }
  cell.write = now;
  cell.fences = fences[threads::current];
  cell.read.epoch = cell.same_epoch = 0;
}

Cell &cell_of(Region &region, uintptr_t address) { return region.cells[(address - region.from) / CELL]; }

void early_access(const Region &region, uintptr_t address, bool writes, Site site) {
  const Cell &cell = region.cells[(address - region.from) / CELL];
  const auto is_early = [](const Access &access) { return access.epoch >= first_epoch && access.epoch < launch_epoch; };
  const Access *other = is_early(cell.write) ? &cell.write : writes && is_early(cell.read) ? &cell.read : nullptr;
  if (!other) return;
  finding("race", "thread %u %s %s at %s before it waits for a kernel that %s there at %s", threads::current,
          writes ? "writes" : "reads", place(region, address).c_str(), named(site).c_str(),
          other == &cell.write ? "wrote" : "read", named(other->site).c_str());
}

}  // namespace

void add_tensor(const char *name, void *address, uint64_t bytes, bool writable, bool overlapping) {
  const uintptr_t shared = (uintptr_t)emulated_shared;
  if (regions.empty()) regions.push_back({"shared", shared, shared, true, false, nullptr});
  const size_t cells = bytes / CELL + 1;
  const uintptr_t from = (uintptr_t)address;
  regions.push_back({name, from, from + bytes, writable, overlapping, (Cell *)calloc(cells, sizeof(Cell))});
}

void set_library(const void *symbol) {
  Dl_info info;
  if (!dladdr(symbol, &info)) return;
  library_from = (uintptr_t)info.dli_fbase;
  dl_iterate_phdr([](dl_phdr_info *loaded, size_t, void *) {
    if (loaded->dlpi_addr != library_from) return 0;
    for (int at = 0; at < loaded->dlpi_phnum; ++at)
      if (loaded->dlpi_phdr[at].p_type == PT_LOAD)
        library_to = library_from + loaded->dlpi_phdr[at].p_vaddr + loaded->dlpi_phdr[at].p_memsz;
    return 1;
  }, nullptr);
}

void finding(const char *kind, const char *format, ...) {
  char text[2000];
  va_list given;
  va_start(given, format);
  vsnprintf(text, sizeof text, format, given);
  va_end(given);
  dprintf(2, "%s in block (%u, %u, %u): %s\n", kind, threads::block[0], threads::block[1], threads::block[2], text);
  _exit(66);
}

void launch_starts(bool overlaps) {
  settle();
  launch_epoch = block_epoch = ++epoch;
  overlapping_launch = overlaps;
  if (!overlaps) first_epoch = launch_epoch;
}

void block_starts(unsigned shared_bytes) {
  Region &shared = regions[0];
  if (!shared.cells) shared.cells = (Cell *)calloc(sizeof emulated_shared / CELL, sizeof(Cell));
  shared.to = shared.from + shared_bytes;
  memset(emulated_shared, 0xff, shared_bytes);
  for (unsigned at = 0; at < shared_bytes / CELL; ++at) shared.cells[at].copies = shared.cells[at].wgmmas = 0;
  block_epoch = ++epoch;
  more.resize(1);
  memset(awaited, !overlapping_launch, sizeof awaited);
  for (unsigned thread = 0; thread < threads::MOST; ++thread)
    if (!clocks[thread][thread]) clocks[thread][thread] = 1;
}

void block_ends() {
  for (unsigned thread = 0; thread < threads::count; ++thread)
    if (!awaited[thread]) finding("no wait", "thread %u ends, but has not waited for the kernel before", thread);
}

void await_last() { awaited[threads::current] = true; }

void all_synchronise() {
  ++epoch;
  more.resize(1);
}

void synchronise(const unsigned *members, unsigned count) {
  uint32_t joined[threads::MOST] = {};
  for (unsigned at = 0; at < count; ++at)
    for (unsigned other = 0; other < threads::count; ++other)
      if (clocks[members[at]][other] > joined[other]) joined[other] = clocks[members[at]][other];
  for (unsigned at = 0; at < count; ++at) {
    memcpy(clocks[members[at]], joined, threads::count * sizeof joined[0]);
    ++clocks[members[at]][members[at]];
  }
}

void access(uintptr_t address, unsigned bytes, bool writes, Site site) {
  settle();
  if (address - threads::stack_from < threads::stack_to - threads::stack_from) return;
  Region *region = find(address, bytes);
  if (!region) {
    if (!writes && address >= library_from && address + bytes <= library_to) return;
    invalid(address, bytes, writes, site);
  }
  if (address % bytes && !(bytes & (bytes - 1)))
    finding("misaligned access", "thread %u %s %u bytes of %s at %s", threads::current, writes ? "writes" : "reads",
            bytes, place(*region, address).c_str(), named(site).c_str());
  if (writes && !region->writable)
    finding("invalid access", "thread %u writes %s, an input, at %s", threads::current, place(*region, address).c_str(),
            named(site).c_str());
  if (traffic::counted) traffic::access((unsigned)(region - regions.data()), address, bytes, writes, site.coded);
  for (uintptr_t at = address; at < address + bytes; at += CELL) {
    if (!awaited[threads::current] && region != &regions[0]) early_access(*region, at, writes, site);
    if (writes) write(*region, cell_of(*region, at), at, site);
    else read(*region, cell_of(*region, at), at, threads::current, site);
  }
}

void settle() {
  if (unordered.empty()) return;
  for (const Unordered &one : unordered) {
    Region &region = *find(one.address, CELL);
    if (memcmp(one.before, (void *)one.address, CELL))
      race(region, one.address, "writes", one.write.site, one.verb, one.other);
    Cell &cell = cell_of(region, one.address);
    cell.same_writers = chained(one.write, same_writers(cell));
    cell.same_epoch = epoch;
  }
  unordered.clear();
}

bool is_shared(uintptr_t address, unsigned bytes) {
  return address >= regions[0].from && address + bytes <= regions[0].to;
}

void copy_starts(uintptr_t address, unsigned bytes, Site site) {
  access(address, bytes, true, site);
  for (const Unordered &one : unordered) race(regions[0], one.address, "copies to", site, one.verb, one.other);
  for (uintptr_t at = address; at < address + bytes; at += CELL) ++cell_of(regions[0], at).copies;
}

void copy_ends(uintptr_t address, unsigned bytes, Site site) {
  for (uintptr_t at = address; at < address + bytes; at += CELL) {
    Cell &cell = cell_of(regions[0], at);
    --cell.copies;
    cell.write = {epoch, clocks[threads::current][threads::current], site, threads::current};
    cell.fences = fences[threads::current];
  }
}

void wgmma_starts(uintptr_t address, unsigned thread, Site site) {
  Region &shared = regions[0];
  if (!is_shared(address, CELL)) invalid(address, CELL, false, site);
  Cell &cell = cell_of(shared, address);
  const unsigned asked = threads::current;
  threads::current = thread;
  read(shared, cell, address, thread, site);
  threads::current = asked;
  const Access &write = cell.write;
  if (write.epoch >= block_epoch && fence_epoch[thread] <= write.epoch && fences[write.thread] <= cell.fences)
    finding("race", "wgmma at %s reads %s, which thread %u wrote at %s, without fence.proxy.async between them",
            named(site).c_str(), place(shared, address).c_str(), write.thread, named(write.site).c_str());
  ++cell.wgmmas;
}

void wgmma_ends(uintptr_t address, unsigned thread, Site site) {
  Cell &cell = cell_of(regions[0], address);
  --cell.wgmmas;
  read(regions[0], cell, address, thread, site);
}

void proxy_fence() {
  ++fences[threads::current];
  fence_epoch[threads::current] = epoch;
}

}  // namespace check

// What -fsanitize=thread calls before every access.
using check::Site;
static Site here(void *address) { return {(uint32_t)((uintptr_t)address - check::library_from) & 0x7fffffff}; }

#define HOOK(name, bytes, writes)                                                              \
  extern "C" void __tsan_##name(void *address) {                                               \
    check::access((uintptr_t)address, bytes, writes, here(__builtin_return_address(0)));       \
  }
#define HOOKS(bytes)                                                                           \
  HOOK(read##bytes, bytes, false)                                                              \
  HOOK(write##bytes, bytes, true)                                                              \
  HOOK(unaligned_read##bytes, bytes, false)                                                    \
  HOOK(unaligned_write##bytes, bytes, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
void __tsan_read_range(void *address, uint64_t bytes) {
  check::access((uintptr_t)address, (unsigned)bytes, false, here(__builtin_return_address(0)));
}
void __tsan_write_range(void *address, uint64_t bytes) {
  check::access((uintptr_t)address, (unsigned)bytes, true, here(__builtin_return_address(0)));
}
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

void emulated_access(const void *address, unsigned bytes, bool writes, int line) {
  check::access((uintptr_t)address, bytes, writes, Site::line(line));
}
void emulated_fence_proxy_async() { check::proxy_fence(); }
void emulated_await_last() { check::await_last(); }
}
