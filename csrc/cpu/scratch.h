// Temporary memory, counted, so that a benchmark can report what a kernel holds beside its tensors.
#pragma once

#include <cstdint>

namespace condense::cpu {

// Uninitialised bytes, aligned to a cache line. Made before threads start: it throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* at(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_;
  int64_t bytes_;
};

// The most bytes that were held at once since the last call with `reset`.
int64_t scratch_peak(bool reset);

}  // namespace condense::cpu
