// compact and compact_: the kept rows of keys and values next to each other, for all layers of a cache in one launch,
// keys turned to their new positions on the way if asked.
//
// A row is moved in units of 16 bytes where addresses, strides and D allow it (bf16 at D 128: 16 units), else by
// elements. Layers differ in their pointers and lengths, which travel by value as a parameter of the launch: no upload,
// and a captured graph replays it.
//
// Out of place, bytes are all that counts: with half of 8,192 tokens kept in 32 layers of 8 heads (D 128, bf16), 537 MB
// are read and as many written. A block takes whole rows, one after another in the result. Its threads first fetch the
// indices of kRows rows, which stand in the order of the result whatever the layout, then the rows' units of K and of
// V, and only then store: 8 loads of 16 bytes in flight in each thread, 64 KiB in two blocks of a multiprocessor, where
// an H100 needs some 10 KB (1.6 TB/s read, 0.8 us, 132 of them). Offsets have 64 bits, but no row costs a division of
// 64 bits: a thread makes one for the first row of its block and counts on from there.
//
// In place, a row may only be overwritten when it has been read. Indices ascend, so row j comes from a row >= j: a
// block that owns a head's column slice goes through its rows from the front, a tile at a time, reads the tile, waits
// for all its threads, and writes it. What it writes, rows below the tile's end, no later tile reads, for those read
// rows at or behind their own places. Column slices are independent of each other (with rotation a slice holds matching
// parts of both halves), so several blocks share a head. The indices of the next tile are fetched before the barrier.
//
// Specification: condense_core/ops/reference/compact.py.
#include <cassert>
#include <type_traits>

#include "cuda/compact.h"
#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/rows.h"

namespace condense::cuda {

namespace {

constexpr int kThreads = CONDENSE_BLOCK(256);
constexpr int kRows = 4;        // rows of a thread at once
constexpr int kMaxLayers = 32;  // 3.8 KiB of parameters

struct Side {  // keys or values of a layer, in elements
  const void* from;
  void* to;
  int64_t batch, head, row;  // strides of `from`
};

struct Layer {
  Side side[2];
  const void *indices, *cu_indices, *cu_seqlens;
  int64_t rows, list;  // N or T; M or R
};

struct Launch {
  Layer layers[kMaxLayers];
  const float *cos, *sin;
  const void* first;
  int heads, kv_heads, units, positions;  // heads: B*G; units of a row
  int block_rows;                         // rows of the result that a block of gather_rows makes
  bool indices_wide, cu_indices_wide, cu_seqlens_wide, first_wide;

  __device__ Integers integers(const void* data, bool wide, int64_t stride = 1) const { return {data, stride, wide}; }

  // How many rows head n has, and where those of keys and of values begin, in elements.
  __device__ int64_t source(const Layer& layer, int n, int64_t (&begin)[2]) const {
    if (!layer.cu_seqlens) {
      const int b = n / kv_heads, g = n - b * kv_heads;
      for (int s = 0; s < 2; ++s) begin[s] = b * layer.side[s].batch + g * layer.side[s].head;
      return layer.rows;
    }
    const Integers offsets = integers(layer.cu_seqlens, cu_seqlens_wide);
    const int64_t start = clamp(offsets[n], layer.rows), stop = clamp(offsets[n + 1], layer.rows);
    for (int s = 0; s < 2; ++s) begin[s] = start * layer.side[s].row;
    return stop > start ? stop - start : 0;
  }

  // Head n's list of indices: its length; its first entry is at `offset`.
  __device__ int64_t list(const Layer& layer, int n, int64_t& offset) const {
    if (!layer.cu_indices) {
      offset = n * layer.list;
      return layer.list;
    }
    const Integers offsets = integers(layer.cu_indices, cu_indices_wide);
    const int64_t start = clamp(offsets[n], layer.list), stop = clamp(offsets[n + 1], layer.list);
    offset = start;
    return stop > start ? stop - start : 0;
  }

  // The row that an index asks for, -1 for none.
  __device__ static int64_t checked(int64_t index, int64_t room) {
    assert(index >= -1 && index < room);
    return index < 0 || index >= room ? -1 : index;
  }

  __device__ int64_t shift(int n, int64_t i, int64_t j) const {
    const int64_t start = first ? integers(first, first_wide)[n] : 0;
    return clamp(i - start - j, positions - 1);
  }
};
static_assert(sizeof(Launch) <= 4096, "more parameters than every driver takes");

// Unit u of the low half and of the high half, turned back by `shift` positions.
template <class T, class Unit>
__device__ void turn_back(const Launch& args, int u, int64_t shift, Unit& low, Unit& high) {
  constexpr int kPer = sizeof(Unit) / sizeof(T);
  T a[kPer], b[kPer];
  memcpy(a, &low, sizeof(Unit));
  memcpy(b, &high, sizeof(Unit));
  const int64_t at = shift * (args.units / 2) * kPer + u * kPer;
  using Angles = std::conditional_t<kPer % 4 == 0, float4, float>;
  constexpr int kAngles = sizeof(Angles) / sizeof(float);
  for (int e = 0; e < kPer; e += kAngles) {
    float c[kAngles], s[kAngles];
    const Angles cos = *reinterpret_cast<const Angles*>(args.cos + at + e);
    const Angles sin = *reinterpret_cast<const Angles*>(args.sin + at + e);
    memcpy(c, &cos, sizeof(Angles));
    memcpy(s, &sin, sizeof(Angles));
    for (int i = 0; i < kAngles; ++i) {
      const float x = widen(a[e + i]), y = widen(b[e + i]);
      narrow(x * c[i] + y * s[i], a[e + i]);
      narrow(y * c[i] - x * s[i], b[e + i]);
    }
  }
  memcpy(&low, a, sizeof(Unit));
  memcpy(&high, b, sizeof(Unit));
}

// The head and the place in its list of the rows that a thread makes, asked for in ascending order.
struct Cursor {
  const Launch& args;
  const Layer& layer;
  int n;
  int64_t first;  // row of the result
  int64_t place;  // of `first`, where all lists have one length

  __device__ Cursor(const Launch& args_, const Layer& layer_, int64_t first_) : args(args_), layer(layer_), n(0) {
    first = first_, place = 0;
    if (!layer.cu_indices) {
      n = static_cast<int>(first / layer.list), place = first % layer.list;
      return;
    }
    const Integers offsets = args.integers(layer.cu_indices, args.cu_indices_wide);
    for (int high = args.heads; high - n > 1;) {  // the last head that begins at or before the row
      const int middle = (n + high) / 2;
      (offsets[middle] <= first ? n : high) = middle;
    }
  }

  // False if row `first + row` belongs to no head.
  __device__ bool find(int row, int& head, int64_t& j) {
    if (!layer.cu_indices) {
      const uint32_t on = static_cast<uint32_t>(place) + row, length = static_cast<uint32_t>(layer.list);
      head = n + static_cast<int>(on / length), j = on % length;
      return true;
    }
    const Integers offsets = args.integers(layer.cu_indices, args.cu_indices_wide);
    while (n + 1 < args.heads && offsets[n + 1] <= first + row) ++n;
    int64_t start;
    const int64_t count = args.list(layer, n, start);
    head = n, j = first + row - start;
    return j >= 0 && j < count;
  }
};

// A lane moves unit u of a row; with rotation unit u of both halves.
template <class T, class Unit, bool kRotate>
__global__ void __launch_bounds__(kThreads, 2) gather_rows(Launch args) {
  constexpr int kPer = sizeof(Unit) / sizeof(T), kHalves = kRotate ? 2 : 1;
  const Layer& layer = args.layers[blockIdx.y];
  const int lanes = args.units / kHalves;
  const int64_t total = layer.cu_indices ? layer.list : layer.list * args.heads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * args.block_rows;
  if (first >= total) return;
  const int places = lanes * static_cast<int>(total - first < args.block_rows ? total - first : args.block_rows);
  const Integers indices = args.integers(layer.indices, args.indices_wide);
  Cursor cursor(args, layer, first);
  for (int base = static_cast<int>(threadIdx.x); base < places; base += kThreads * kRows) {
    Word index[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const int place = base + r * kThreads;
      if (place < places) index[r] = indices.word(first + place / lanes);
    }
    Unit value[2][kRows][kHalves] = {};
    int64_t shift[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const int place = base + r * kThreads, row = place / lanes, u = place - row * lanes;
      int n;
      int64_t j, begin[2];
      if (place >= places || !cursor.find(row, n, j)) continue;
      const int64_t room = args.source(layer, n, begin), i = Launch::checked(indices.value(index[r]), room);
      if (i < 0) continue;
      for (int s = 0; s < 2; ++s) {
        const Side& side = layer.side[s];
        const T* from = static_cast<const T*>(side.from) + begin[s] + i * side.row + u * kPer;
        value[s][r][0] = *reinterpret_cast<const Unit*>(from);
        if constexpr (kRotate) value[s][r][1] = *reinterpret_cast<const Unit*>(from + lanes * kPer);
      }
      if constexpr (kRotate) shift[r] = args.shift(n, i, j);
    }
    for (int r = 0; r < kRows; ++r) {
      const int place = base + r * kThreads, row = place / lanes, u = place - row * lanes;
      if (place >= places) continue;
      if constexpr (kRotate) turn_back<T>(args, u, shift[r], value[0][r][0], value[0][r][1]);
      for (int s = 0; s < 2; ++s) {
        T* to = static_cast<T*>(layer.side[s].to) + ((first + row) * args.units + u) * kPer;
        *reinterpret_cast<Unit*>(to) = value[s][r][0];
        if constexpr (kRotate) *reinterpret_cast<Unit*>(to + lanes * kPer) = value[s][r][1];
      }
    }
  }
}

// Grid: column slices of all heads, 2 * layers (keys, then values). A slice is kSlice units wide.
constexpr int kSlice = 8;

template <class T, class Unit, bool kRotate>
__global__ void __launch_bounds__(kThreads, 2) move_rows(Launch args) {
  constexpr int kPer = sizeof(Unit) / sizeof(T), kHalves = kRotate ? 2 : 1, kTile = kThreads / kSlice;
  const Layer& layer = args.layers[blockIdx.y / 2];
  const Side& side = layer.side[blockIdx.y % 2];
  const bool turned = kRotate && blockIdx.y % 2 == 0;
  const int lanes = args.units / kHalves, slices = (lanes + kSlice - 1) / kSlice;
  const int n = static_cast<int>(blockIdx.x) / slices, slice = static_cast<int>(blockIdx.x) % slices;
  const int u = slice * kSlice + static_cast<int>(threadIdx.x) % kSlice;
  int64_t begin[2], offset;
  const int64_t room = args.source(layer, n, begin), length = args.list(layer, n, offset);
  const int64_t count = length < room ? length : room;
  T* head = static_cast<T*>(side.to) + (blockIdx.y % 2 ? begin[1] : begin[0]) + u * kPer;
  const Integers indices = args.integers(layer.indices, args.indices_wide);
  Word next[kRows];
  const auto fetch = [&](int64_t base) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t j = base + r * kTile + threadIdx.x / kSlice;
      next[r] = u < lanes && j < count ? indices.word(offset + j) : Word{-1, -1};
    }
  };
  fetch(0);
  for (int64_t base = 0; base < count; base += kTile * kRows) {
    Unit value[kRows][kHalves];
    int64_t from[kRows];
    for (int r = 0; r < kRows; ++r) {
      from[r] = Launch::checked(indices.value(next[r]), room);
      if (from[r] < 0) continue;
      const T* row = head + from[r] * side.row;
      value[r][0] = *reinterpret_cast<const Unit*>(row);
      if constexpr (kRotate) value[r][1] = *reinterpret_cast<const Unit*>(row + lanes * kPer);
    }
    fetch(base + kTile * kRows);
    __syncthreads();  // all of the tile has been read; a later one reads behind what is now written
    for (int r = 0; r < kRows; ++r) {
      const int64_t j = base + r * kTile + threadIdx.x / kSlice;
      if (from[r] < 0) continue;
      if constexpr (kRotate) {
        if (turned) turn_back<T>(args, u, args.shift(n, from[r], j), value[r][0], value[r][1]);
      }
      T* row = head + j * side.row;
      *reinterpret_cast<Unit*>(row) = value[r][0];
      if constexpr (kRotate) *reinterpret_cast<Unit*>(row + lanes * kPer) = value[r][1];
    }
  }
}

void run(const char* op, const Call& call, uintptr_t stream) {
  const Views &k = call.k, &v = call.v, &cu_seqlens = call.cu_seqlens, &indices = call.indices;
  const Views &cu_indices = call.cu_indices, *const k_out = call.k_out, *const v_out = call.v_out;
  const View &cos = call.cos, &sin = call.sin, &first = call.first;
  CONDENSE_CHECK(!k.empty(), "k is an empty list, expected a tensor for each layer");
  for (const Views* views : {&v, &indices, k_out, v_out}) {
    CONDENSE_CHECK(!views || views->size() == k.size(), "expected lists of one length, k has ", int64_t(k.size()),
                   " layers, another list ", int64_t(views ? views->size() : 0));
  }
  for (const Views* views : {&cu_seqlens, &cu_indices}) {
    CONDENSE_CHECK(views->empty() || views->size() == k.size(), "expected offsets for none or all of ",
                   int64_t(k.size()), " layers, there are ", int64_t(views->size()));
  }
  const bool ragged = !cu_seqlens.empty(), listed = !cu_indices.empty(), rotate = bool(cos);
  const View& one = k[0];
  check_tensor(op, "k", one, ragged ? 2 : 4);
  check_dtype(op, "k", one, kFloats);
  if (ragged) check_shape(op, "cu_seqlens", cu_seqlens[0], {kSome});
  const int64_t heads = ragged ? cu_seqlens[0].size[0] - 1 : one.size[0] * one.size[1], d = one.size[one.rank - 1];
  CONDENSE_CHECK(d >= 1 && d < int64_t{1} << 24 && heads < int64_t{1} << 24, "k has ", heads, " heads of ", d,
                 " channels, expected 1 or more channels and fewer than 2^24 of each");
  check_layers(op, call, heads, d);
  if (heads == 0) return;
  const int64_t bytes = bytes_of(one.dtype);
  bool wide_units = d * bytes % (rotate ? 32 : 16) == 0;
  for (const Views* views : {&k, &v, k_out, v_out}) {
    for (size_t l = 0; views && l < k.size(); ++l) wide_units = wide_units && aligned((*views)[l]);
  }
  if (rotate) wide_units = wide_units && aligned(cos) && aligned(sin);
  Launch args{};
  args.heads = static_cast<int>(heads);
  args.kv_heads = static_cast<int>(!ragged ? one.size[1] : !listed ? indices[0].size[1] : 1);
  args.cos = cos.as<const float>(), args.sin = sin.as<const float>();
  args.positions = rotate ? static_cast<int>(cos.size[0]) : 1;
  args.first = first ? first.data : nullptr, args.first_wide = first.dtype == Dtype::i64;
  args.units = static_cast<int>(wide_units ? d * bytes / 16 : d);
  args.indices_wide = indices[0].dtype == Dtype::i64;
  args.cu_indices_wide = listed && cu_indices[0].dtype == Dtype::i64;
  args.cu_seqlens_wide = ragged && cu_seqlens[0].dtype == Dtype::i64;
  const int lanes = rotate ? args.units / 2 : args.units, slices = (lanes + kSlice - 1) / kSlice;
  args.block_rows = lanes < kThreads * kRows ? kThreads * kRows / lanes : 1;

  for (size_t from = 0; from < k.size(); from += kMaxLayers) {
    const size_t count = k.size() - from < kMaxLayers ? k.size() - from : kMaxLayers;
    int64_t rows = 0;
    for (size_t l = 0; l < count; ++l) {
      Layer& layer = args.layers[l];
      for (int s = 0; s < 2; ++s) {
        const View& x = (s ? v : k)[from + l];
        void* to = k_out ? (s ? *v_out : *k_out)[from + l].data : x.data;
        layer.side[s] = {x.data, to, ragged ? 0 : x.stride[0], ragged ? 0 : x.stride[1], x.stride[x.rank - 2]};
      }
      const View& list = indices[from + l];
      layer.indices = list.data;
      layer.cu_indices = listed ? cu_indices[from + l].data : nullptr;
      layer.cu_seqlens = ragged ? cu_seqlens[from + l].data : nullptr;
      layer.rows = ragged ? k[from + l].size[0] : k[from + l].size[2];
      layer.list = listed ? list.size[0] : list.size[2];
      const int64_t total = listed ? layer.list : layer.list * args.heads;
      CONDENSE_CHECK(total < int64_t{1} << 31, "indices has ", total, " entries, expected fewer than 2^31");
      rows = total > rows ? total : rows;
    }
    if (rows == 0) continue;
    by_type(one.dtype, [&]<class T>(T*) {
      const auto go = [&]<class Unit>(Unit*) {
        if (k_out) {
          const int64_t blocks = (rows + args.block_rows - 1) / args.block_rows;
          const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
          launch(rotate ? gather_rows<T, Unit, true> : gather_rows<T, Unit, false>, grid, dim3(kThreads), stream, args);
        } else {
          const dim3 grid(static_cast<unsigned>(slices) * args.heads, static_cast<unsigned>(2 * count));
          launch(rotate ? move_rows<T, Unit, true> : move_rows<T, Unit, false>, grid, dim3(kThreads), stream, args);
        }
      };
      wide_units ? go(static_cast<uint4*>(nullptr)) : go(static_cast<T*>(nullptr));
    });
  }
}

}  // namespace

void compact(const Views& k, const Views& v, const Views& cu_seqlens, const Views& indices, const Views& cu_indices,
             const View& cos, const View& sin, const View& first, const Views& k_out, const Views& v_out,
             uintptr_t stream) {
  run("compact", {k, v, cu_seqlens, indices, cu_indices, cos, sin, first, &k_out, &v_out}, stream);
}

void compact_(const Views& k, const Views& v, const Views& cu_seqlens, const Views& indices, const Views& cu_indices,
              const View& cos, const View& sin, const View& first, uintptr_t stream) {
  run("compact_", {k, v, cu_seqlens, indices, cu_indices, cos, sin, first, nullptr, nullptr}, stream);
}

}  // namespace condense::cuda
