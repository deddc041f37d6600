// Runs CUDA kernels in the emulation on cases from a file, for tests: run_cases CASES RESULTS.
//
// A case: a name, then arguments, each a letter and its value. i: int64. d: double. t: a tensor, as dtype, rank, sizes,
// strides, the number of bytes and the bytes. n: None. l: a count and so many tensors. The results are the bytes of all
// tensors in order. A kernel that refuses its arguments is reported as `refused PLACE: TEXT` on stderr. Every tensor
// lies in memory of exactly its size, so that AddressSanitizer sees what is read beyond it.
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>

#include "cuda/cuda.h"

namespace {

using namespace condense;

struct Case {
  std::vector<int64_t> numbers;
  std::vector<double> reals;
  std::vector<View> views;
  std::vector<cuda::Views> lists;
};

std::deque<std::pair<std::unique_ptr<unsigned char[]>, int64_t>> buffers;

void read(FILE* file, void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, file) != bytes) throw std::runtime_error("the file of cases ends early");
}

int64_t read_number(FILE* file) {
  int64_t value;
  read(file, &value, sizeof(value));
  return value;
}

View read_view(FILE* file) {
  View view;
  view.dtype = static_cast<Dtype>(read_number(file));
  view.rank = static_cast<int>(read_number(file));
  for (int i = 0; i < view.rank; ++i) view.size[i] = read_number(file);
  for (int i = 0; i < view.rank; ++i) view.stride[i] = read_number(file);
  const int64_t bytes = read_number(file);
  buffers.emplace_back(new unsigned char[bytes], bytes);
  read(file, buffers.back().first.get(), bytes);
  view.data = buffers.back().first.get();
  return view;
}

const std::map<std::string, std::function<void(Case&)>> kOps = {
    {"attention_pool",
     [](Case& c) {
       cuda::attention_pool(c.views[0], c.views[1], c.numbers[0], c.numbers[1], c.views[2], c.views[3], c.numbers[2],
                            c.reals[0], c.views[4], c.views[5], c.reals[1], c.views[6], c.views[7], 0);
     }},
    {"select",
     [](Case& c) { cuda::select(c.views[0], c.numbers[0], c.numbers[1], c.views[1], c.views[2], c.views[3], 0); }},
    {"compact",
     [](Case& c) {
       cuda::compact(c.lists[0], c.lists[1], c.lists[2], c.lists[3], c.lists[4], c.views[0], c.views[1], c.views[2],
                     c.lists[5], c.lists[6], 0);
     }},
    {"compact_",
     [](Case& c) {
       cuda::compact_(c.lists[0], c.lists[1], c.lists[2], c.lists[3], c.lists[4], c.views[0], c.views[1], c.views[2],
                      0);
     }},
    {"ragged_append",
     [](Case& c) { cuda::ragged_append(c.views[0], c.views[1], c.views[2], c.views[3], c.views[4], c.views[5], 0); }},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: run_cases CASES RESULTS\n"), 2;
  FILE *in = std::fopen(arguments[1], "rb"), *out = std::fopen(arguments[2], "wb");
  if (!in || !out) return std::fprintf(stderr, "error: cannot open %s or %s\n", arguments[1], arguments[2]), 2;
  int place = 0;
  for (int length; (length = std::fgetc(in)) != EOF;) {
    std::string name(length, '\0');
    read(in, name.data(), length);
    Case one;
    buffers.clear();
    for (int kind; (kind = std::fgetc(in)) != '.';) {
      if (kind == 'i') one.numbers.push_back(read_number(in));
      if (kind == 'd') {
        one.reals.emplace_back();
        read(in, &one.reals.back(), sizeof(double));
      }
      if (kind == 't') one.views.push_back(read_view(in));
      if (kind == 'n') one.views.emplace_back();
      if (kind == 'l') {
        one.lists.emplace_back(read_number(in));
        for (View& view : one.lists.back()) view = read_view(in);
      }
      if (kind == EOF) throw std::runtime_error("the file of cases ends early");
    }
    try {
      kOps.at(name)(one);
    } catch (const std::invalid_argument& error) {
      std::fprintf(stderr, "refused %d: %s\n", place, error.what());
    }
    ++place;
    for (auto& [data, bytes] : buffers) std::fwrite(data.get(), 1, bytes, out);
  }
  return std::fclose(out) ? 1 : 0;
}
