// ragged_append: the rows of t new tokens [B, G, t, D] behind the valid ones of a ragged cache [T, D], in place; then
// every length grows by t. Reads and writes the new rows once: 8 KB each way for a token of a layer (8 heads, D 128,
// bf16), so a launch costs more than its bytes. One for keys, values and lengths, nothing read back: a captured decode
// step replays it.
//
// A block takes a head. All its threads read the head's length before one of them writes it, and no other block looks
// at it. Rows move in units of 16 bytes where addresses, strides and D allow it, else by elements.
//
// Specification: condense_core/ops/reference/ragged_append.py.
#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace condense::cuda {

namespace {

constexpr int kThreads = CONDENSE_BLOCK(256);

struct Side {  // keys or values, strides in elements
  void* cache;
  const void* added;
  int64_t row;                 // of the cache
  int64_t batch, head, token;  // of the new rows
};

struct Append {
  Side side[2];
  Integers offsets;
  void* lengths;
  int64_t length_stride, rows;  // rows: T
  int added, units, kv_heads;   // units of a row
  bool wide;
};

template <class T, class Unit>
__global__ void __launch_bounds__(kThreads) append_rows(Append args) {
  constexpr int kPer = sizeof(Unit) / sizeof(T);
  const int n = static_cast<int>(blockIdx.x), b = n / args.kv_heads, g = n - b * args.kv_heads;
  const int64_t at = n * args.length_stride;
  const int64_t length = Integers{args.lengths, 1, args.wide}[at];
  const int64_t start = clamp(args.offsets[n], args.rows) + (length > 0 ? length : 0);
  const int64_t stop = clamp(args.offsets[n + 1], args.rows);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.wide)
      static_cast<int64_t*>(args.lengths)[at] = length + args.added;
    else
      static_cast<int32_t*>(args.lengths)[at] = static_cast<int32_t>(length + args.added);
  }
  const int64_t room = stop > start ? stop - start : 0;
  const int64_t places = (room < args.added ? room : args.added) * args.units;
  for (int64_t place = threadIdx.x; place < places; place += kThreads) {
    const int64_t j = place / args.units, column = place % args.units * kPer;
    Unit value[2];
    for (int s = 0; s < 2; ++s) {
      const Side& side = args.side[s];
      const T* from = static_cast<const T*>(side.added) + b * side.batch + g * side.head + j * side.token;
      value[s] = *reinterpret_cast<const Unit*>(from + column);
    }
    for (int s = 0; s < 2; ++s) {
      T* to = static_cast<T*>(args.side[s].cache) + (start + j) * args.side[s].row;
      *reinterpret_cast<Unit*>(to + column) = value[s];
    }
  }
}

}  // namespace

void ragged_append(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                   const View& v_new, uintptr_t stream) {
  constexpr const char* op = "ragged_append";
  CONDENSE_CHECK_FLOAT(k_new, 4);
  const int64_t batch = k_new.size[0], kv_heads = k_new.size[1], added = k_new.size[2], d = k_new.size[3];
  const int64_t heads = batch * kv_heads;
  CONDENSE_CHECK_SHAPE(v_new, batch, kv_heads, added, d);
  CONDENSE_CHECK_SAME_DTYPE(v_new, k_new);
  CONDENSE_CHECK_SHAPE(k, kAny, d);
  CONDENSE_CHECK_SHAPE(v, k.size[0], d);
  CONDENSE_CHECK_SAME_DTYPE(k, k_new);
  CONDENSE_CHECK_SAME_DTYPE(v, k_new);
  CONDENSE_CHECK_WRITABLE(k);
  CONDENSE_CHECK_WRITABLE(v);
  CONDENSE_CHECK_INTEGER(cu_seqlens, 1);
  CONDENSE_CHECK_SHAPE(cu_seqlens, heads + 1);
  CONDENSE_CHECK_INTEGER(lengths, 1);
  CONDENSE_CHECK_SHAPE(lengths, heads);
  CONDENSE_CHECK_WRITABLE(lengths);
  constexpr int64_t kMost = int64_t{1} << 31;
  CONDENSE_CHECK(heads < kMost && added < kMost && d < kMost, "k_new has ", heads, " heads, ", added, " tokens and ", d,
                 " channels, expected fewer than 2^31 of each");
  if (heads == 0) return;
  bool wide_units = d * bytes_of(k.dtype) % 16 == 0;
  for (const View* x : {&k, &v, &k_new, &v_new}) {
    check_rows(op, x == &k ? "k" : x == &v ? "v" : x == &k_new ? "k_new" : "v_new", *x);
    wide_units = wide_units && aligned(*x);
  }
  Append args{};
  args.side[0] = {k.data, k_new.data, k.stride[0], k_new.stride[0], k_new.stride[1], k_new.stride[2]};
  args.side[1] = {v.data, v_new.data, v.stride[0], v_new.stride[0], v_new.stride[1], v_new.stride[2]};
  args.offsets = {cu_seqlens.data, cu_seqlens.stride[0], cu_seqlens.dtype == Dtype::i64};
  args.lengths = lengths.data, args.length_stride = lengths.stride[0], args.wide = lengths.dtype == Dtype::i64;
  args.rows = k.size[0], args.added = static_cast<int>(added);
  args.units = static_cast<int>(wide_units ? d * bytes_of(k.dtype) / 16 : d);
  args.kv_heads = static_cast<int>(kv_heads);
  by_type(k.dtype, [&]<class T>(T*) {
    launch(wide_units ? append_rows<T, uint4> : append_rows<T, T>, dim3(static_cast<unsigned>(heads)), dim3(kThreads),
           stream, args);
  });
}

}  // namespace condense::cuda
