// Requests are put together from what each thread does: a warp's lanes need not run at the same time here.
#include "traffic.h"

#include <inttypes.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "threads.h"

namespace traffic {

bool counted = false;

namespace {

constexpr unsigned SECTOR = 32, BANKS = 32, WORD = 4;

using Place = std::tuple<uint32_t, unsigned, bool>;  // site, tensor, whether it writes

// What the lanes of a warp ask for when they come to a place for the same time.
struct Request {
  unsigned bytes = 0;
  std::map<unsigned, uintptr_t> addresses;  // of each lane
};

// `least` and `taken` count sectors or rounds; `least` are those that the distinct bytes of each request would fill.
struct Total {
  uint64_t requests = 0, lanes = 0, bytes = 0, least = 0, taken = 0;
};

std::string kernel;
std::map<std::pair<unsigned, Place>, uint32_t> visits;                // of a thread
std::map<std::tuple<unsigned, Place, uint32_t>, Request> requests;  // of a warp
std::map<std::pair<std::string, Place>, Total> totals;

uint64_t sectors(const Request &request) {
  std::set<uintptr_t> touched;
  for (const auto &[lane, address] : request.addresses)
    for (uintptr_t at = address / SECTOR; at <= (address + request.bytes - 1) / SECTOR; ++at) touched.insert(at);
  return touched.size();
}

// Neighbours that ask for 128 bytes together go in one round; a bank gives one word in a round, to all who want it.
uint64_t rounds(const Request &request) {
  const unsigned together = BANKS / std::max(1u, request.bytes / WORD);
  std::map<unsigned, std::map<uintptr_t, std::set<uintptr_t>>> words;  // of a group and a bank
  for (const auto &[lane, address] : request.addresses)
    for (uintptr_t word = address / WORD; word <= (address + request.bytes - 1) / WORD; ++word)
      words[lane / together][word % BANKS].insert(word);
  uint64_t sum = 0;
  for (const auto &[group, banks] : words) {
    size_t most = 0;
    for (const auto &[bank, given] : banks) most = std::max(most, given.size());
    sum += most;
  }
  return sum;
}

uint64_t least(const Request &request, unsigned unit) {
  std::set<uintptr_t> distinct;
  for (const auto &[lane, address] : request.addresses) distinct.insert(address);
  return (distinct.size() * request.bytes + unit - 1) / unit;
}

}  // namespace

void launch_starts(const std::string &name) { kernel = name; }

void access(unsigned tensor, uintptr_t address, unsigned bytes, bool write, uint32_t site) {
  const Place place(site, tensor, write);
  Request &request = requests[{threads::current / threads::WARP, place, visits[{threads::current, place}]++}];
  request.bytes = bytes;
  request.addresses[threads::current % threads::WARP] = address;
}

void block_ends() {
  for (const auto &[key, request] : requests) {
    const Place &place = std::get<1>(key);
    const bool shared = std::get<1>(place) == 0;
    Total &total = totals[{kernel, place}];
    ++total.requests;
    total.lanes += request.addresses.size();
    total.bytes += request.addresses.size() * request.bytes;
    total.least += least(request, shared ? BANKS * WORD : SECTOR);
    total.taken += shared ? rounds(request) : sectors(request);
  }
  visits.clear();
  requests.clear();
}

void tell() {
  for (const auto &[key, total] : totals) {
    const auto [site, tensor, write] = key.second;
    const char *counts = " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n";
    printf("%s %u %u %d", key.first.c_str(), site, tensor, write);
    printf(counts, total.requests, total.lanes, total.bytes, total.least, total.taken);
  }
  fflush(stdout);
}

}  // namespace traffic

extern "C" {
void emulated_count_traffic() { traffic::counted = true; }
void emulated_tell_traffic() { traffic::tell(); }
}
