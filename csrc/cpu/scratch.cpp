#include "cpu/scratch.h"

#include <atomic>
#include <new>

namespace condense::cpu {

namespace {
constexpr std::align_val_t kAlignment{64};
std::atomic<int64_t> held{0}, peak{0};
}  // namespace

Scratch::Scratch(int64_t bytes) : data_(::operator new(bytes > 0 ? bytes : 1, kAlignment)), bytes_(bytes) {
  const int64_t now = held.fetch_add(bytes) + bytes;
  int64_t seen = peak.load();
  while (seen < now && !peak.compare_exchange_weak(seen, now)) {
  }
}

Scratch::~Scratch() {
  ::operator delete(data_, kAlignment);
  held.fetch_sub(bytes_);
}

int64_t scratch_peak(bool reset) { return reset ? peak.exchange(held.load()) : peak.load(); }

}  // namespace condense::cpu
