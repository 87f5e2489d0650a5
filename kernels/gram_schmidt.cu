/* Gram-Schmidt in two passes for many tokens at once, one basis each.

   Basis Q (j, d) of orthonormal rows, X (WIDTH, d), for every token:

       c = X Q^T,   Y = X - c Q,   e = Y Q^T,   Z = Y - e Q;       Z and c + e are the result.

   ("Twice is enough": Giraud, Langou & Rozloznik, 2005.) WIDTH is small, so the time is that of
   reading Q. Written as four products Q is read four times. But e is a sum over columns, and a
   tile of columns of Q, once loaded, gives that tile of Y and, from the same registers and shared
   memory, the tile's part of e:

       dot          c                      reads Q, X                 j d + b d
       fused        Y, e                   reads Q, X, writes Y       j d + 2 b d
       subtract     Z                      reads Q, Y, writes Z       j d + 2 b d

   three reads of Q. Where the whole of one token's Q fits into the shared memory of CLUSTER thread
   blocks (compute capability 9.0 and above), a single kernel, on_chip, reads it once:

       on_chip      Z, c + e               reads Q, X, writes Z       j d + 2 b d

   A thread block takes one token and `tiles` consecutive tiles of TILE columns. The rows of a tile
   are dealt to its warps, the columns of a row to a warp's lanes. Sums over columns: within a lane,
   over lanes by a butterfly, over tiles, then over thread blocks by whoever reads them, always in
   the same order: nothing is added atomically, and equal shapes give equal bits. Everything is in
   the type of the data; a sum of d terms is a tree of depth about d / (32 lanes) at the most, and
   its error grows with that depth, not with d.

   Compiled once for each of
       WIDTH         rows of X,
       VECTOR_BYTES  bytes a lane loads at once: 16 where rows are aligned to it, else 0 (one entry),
       VECTORS       how many of those a lane has in a row of a tile,
       CLUSTER       thread blocks of a cluster; not defined where there are no clusters. */

#ifndef WIDTH
#define WIDTH 1
#endif
#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif
#ifndef VECTORS
#define VECTORS 2
#endif
#define MAX_THREADS 512

// What a thread needs of the machine; a test that runs this file on the CPU brings its own.
#ifdef __CUDACC__

template <typename T>
__device__ T from_lane(T value, int lane) {
  return __shfl_xor_sync(0xffffffffu, value, lane);
}

__device__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#ifdef CLUSTER
__device__ void synchronise_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ unsigned address_in(const void* shared, int rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(rank));
  return address;
}

// What lies at this place of the shared memory of another thread block of the cluster.
__device__ float read_from(const float* shared, int rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(value)
               : "r"(address_in(shared, rank))
               : "memory");
  return value;
}

__device__ double read_from(const double* shared, int rank) {
  double value;
  asm volatile("ld.shared::cluster.f64 %0, [%1];"
               : "=d"(value)
               : "r"(address_in(shared, rank))
               : "memory");
  return value;
}
#endif

#endif

constexpr int LANES = 32;

template <typename T>
struct Layout {
  static constexpr int VECTOR = VECTOR_BYTES ? VECTOR_BYTES / sizeof(T) : 1;
  static constexpr int TILE = LANES * VECTORS * VECTOR;
};

// Entries that a lane loads at once.
template <typename T>
struct alignas(Layout<T>::VECTOR * sizeof(T)) Vector {
  T at[Layout<T>::VECTOR];
};

// A lane's entries in one row of a tile.
template <typename T>
struct Strip {
  Vector<T> at[VECTORS];
};

// Where vector n of this lane begins in a tile.
template <typename T>
__device__ int offset(int n) {
  return (n * LANES + static_cast<int>(threadIdx.x) % LANES) * Layout<T>::VECTOR;
}

// This lane's strip of a row that has `left` entries from the tile's first column on.
template <typename T>
__device__ Strip<T> load(const T* row, int left) {
  Strip<T> strip = {};
#pragma unroll
  for (int n = 0; n < VECTORS; ++n)
    if (offset<T>(n) < left) strip.at[n] = *reinterpret_cast<const Vector<T>*>(row + offset<T>(n));
  return strip;
}

template <typename T>
__device__ void store(T* row, const Strip<T>& strip) {
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) *reinterpret_cast<Vector<T>*>(row + offset<T>(n)) = strip.at[n];
}

template <typename T>
__device__ T inner(const Strip<T>& q, const Strip<T>& x) {
  T sum = 0;
#pragma unroll
  for (int n = 0; n < VECTORS; ++n)
#pragma unroll
    for (int v = 0; v < Layout<T>::VECTOR; ++v) sum += q.at[n].at[v] * x.at[n].at[v];
#pragma unroll
  for (int lane = LANES / 2; lane; lane /= 2) sum += from_lane(sum, lane);
  return sum;
}

template <typename T>
__device__ void add(Strip<T>& total, T factor, const Strip<T>& q) {
#pragma unroll
  for (int n = 0; n < VECTORS; ++n)
#pragma unroll
    for (int v = 0; v < Layout<T>::VECTOR; ++v) total.at[n].at[v] += factor * q.at[n].at[v];
}

// Calls visit(i, strip) for the rows of this warp; several loads are under way at a time. Past the
// last row, i is `rows` or more and the strip is zero: every lane makes every call.
template <typename T, typename Read, typename Visit>
__device__ void for_rows(int rows, Read read, Visit visit) {
  constexpr int AHEAD = WIDTH > 2 ? 2 : 4;
  const int warps = blockDim.x / LANES;
  for (int first = threadIdx.x / LANES; first < rows; first += AHEAD * warps) {
    Strip<T> q[AHEAD] = {};
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (first + u * warps < rows) q[u] = read(first + u * warps);
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) visit(first + u * warps, q[u]);
  }
}

// sums[b, i] += <q_i, x_b> over a tile. A row's sums belong to one warp.
template <typename T, typename Read>
__device__ void dot_tile(int rows, Read read, const Strip<T> (&x)[WIDTH], T* sums) {
  for_rows<T>(rows, read, [&](int i, const Strip<T>& q) {
#pragma unroll
    for (int b = 0; b < WIDTH; ++b) {
      const T sum = inner(q, x[b]);
      if (threadIdx.x % LANES == 0 && i < rows) sums[b * rows + i] += sum;
    }
  });
}

// y[b] -= sum_i factors[b, i] q_i over a tile, y (WIDTH, TILE) in shared memory. `across`
// (warps, TILE) is where the warps' sums meet. A column belongs to one thread here and in copy_in
// and copy_out; on return all threads see all of y.
template <typename T, typename Read>
__device__ void subtract_tile(int rows, Read read, const T* factors, T* across, T* y) {
  constexpr int TILE = Layout<T>::TILE;
  const int warps = blockDim.x / LANES, warp = threadIdx.x / LANES;
  Strip<T> total[WIDTH] = {};
  for_rows<T>(rows, read, [&](int i, const Strip<T>& q) {
#pragma unroll
    for (int b = 0; b < WIDTH; ++b)
      if (i < rows) add(total[b], factors[b * rows + i], q);
  });
#pragma unroll
  for (int b = 0; b < WIDTH; ++b) {
    store(across + warp * TILE, total[b]);
    __syncthreads();
    for (int column = threadIdx.x; column < TILE; column += blockDim.x) {
      T sum = 0;
      for (int w = 0; w < warps; ++w) sum += across[w * TILE + column];
      y[b * TILE + column] -= sum;
    }
    __syncthreads();
  }
}

// y = a tile of X of which `left` columns exist; zero past them.
template <typename T>
__device__ void copy_in(const T* X, int columns, int left, T* y) {
  constexpr int TILE = Layout<T>::TILE;
  for (int b = 0; b < WIDTH; ++b)
    for (int column = threadIdx.x; column < TILE; column += blockDim.x)
      y[b * TILE + column] = column < left ? X[static_cast<long long>(b) * columns + column] : T(0);
}

template <typename T>
__device__ void copy_out(const T* y, int columns, int left, T* rest) {
  constexpr int TILE = Layout<T>::TILE;
  for (int b = 0; b < WIDTH; ++b)
    for (int column = threadIdx.x; column < TILE && column < left; column += blockDim.x)
      rest[static_cast<long long>(b) * columns + column] = y[b * TILE + column];
}

template <typename T>
__device__ void load_all(Strip<T> (&x)[WIDTH], const T* first, long long stride, int left) {
#pragma unroll
  for (int b = 0; b < WIDTH; ++b) x[b] = load(first + b * stride, left);
}

// factors[b, i] = sum over a token's thread blocks of partial[block, b, i], in order of the blocks.
template <typename T>
__device__ void gather(const T* partial, int blocks, int size, T* factors) {
  for (int k = threadIdx.x; k < size; k += blockDim.x) {
    T sum = 0;
#pragma unroll 8
    for (int s = 0; s < blocks; ++s) sum += partial[static_cast<long long>(s) * size + k];
    factors[k] = sum;
  }
}

template <typename T>
__device__ void clear(T* values, int size) {
  for (int k = threadIdx.x; k < size; k += blockDim.x) values[k] = 0;
}

/* Every kernel has the same parameters:
     basis       Q, row i of token t at basis + t * batch_stride + i * row_stride
     X, rest     (tokens, WIDTH, columns)
     components  (tokens, WIDTH, rows)
     first       (tokens, blocks, WIDTH, rows): parts of c, from dot
     second      (tokens, blocks, WIDTH, rows): parts of e, from fused
     tiles       tiles of a thread block
     blocks      thread blocks of a token
     held        whether shared memory holds the tile between its two uses in fused, or else the
                 tile is read again, through the caches */
#define PARAMETERS(T)                                                                       \
  const T *basis, long long batch_stride, long long row_stride, const T *X, T *rest,        \
      T *components, T *first, T *second, int rows, int columns, int tiles, int blocks, int held
#define ARGUMENTS                                                                           \
  basis, batch_stride, row_stride, X, rest, components, first, second, rows, columns, tiles, \
      blocks, held

// Shared memory: sums (WIDTH, rows).
template <typename T>
__device__ void dot(PARAMETERS(T)) {
  constexpr int TILE = Layout<T>::TILE;
  const long long token = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks, size = WIDTH * rows;
  T* sums = reinterpret_cast<T*>(shared_memory());
  clear(sums, size);
  __syncthreads();
  for (int tile = block * tiles; tile < (block + 1) * tiles && tile * TILE < columns; ++tile) {
    const int start = tile * TILE, left = columns - start;
    const T* q = basis + token * batch_stride + start;
    Strip<T> x[WIDTH];
    load_all(x, X + token * WIDTH * columns + start, columns, left);
    dot_tile(rows, [&](int i) { return load(q + i * row_stride, left); }, x, sums);
  }
  __syncthreads();
  T* part = first + blockIdx.x * static_cast<long long>(size);
  for (int k = threadIdx.x; k < size; k += blockDim.x) part[k] = sums[k];
}

// Shared memory: the tile (rows, TILE) where held, across (warps, TILE), y (WIDTH, TILE),
// factors and sums (WIDTH, rows).
template <typename T>
__device__ void fused(PARAMETERS(T)) {
  constexpr int TILE = Layout<T>::TILE;
  // From the last token to the first: what dot read last may still be in the L2 cache.
  const int reversed = gridDim.x - 1 - blockIdx.x;
  const long long token = reversed / blocks;
  const int block = reversed % blocks, size = WIDTH * rows;
  T* kept = reinterpret_cast<T*>(shared_memory());
  T* across = kept + (held ? rows * TILE : 0);
  T* y = across + blockDim.x / LANES * TILE;
  T* factors = y + WIDTH * TILE;
  T* sums = factors + size;
  gather(first + token * blocks * size, blocks, size, factors);
  clear(sums, size);
  __syncthreads();
  if (block == 0)
    for (int k = threadIdx.x; k < size; k += blockDim.x) components[token * size + k] = factors[k];
  for (int tile = block * tiles; tile < (block + 1) * tiles && tile * TILE < columns; ++tile) {
    const int start = tile * TILE, left = columns - start;
    const T* q = basis + token * batch_stride + start;
    const long long place = token * WIDTH * columns + start;
    const auto read = [&](int i) { return load(q + i * row_stride, left); };
    const auto read_kept = [&](int i) { return load(kept + i * TILE, TILE); };
    const auto read_and_keep = [&](int i) {
      const Strip<T> strip = read(i);
      store(kept + i * TILE, strip);
      return strip;
    };
    copy_in(X + place, columns, left, y);
    Strip<T> x[WIDTH];
    if (held) {
      subtract_tile(rows, read_and_keep, factors, across, y);
      load_all(x, y, TILE, TILE);
      dot_tile(rows, read_kept, x, sums);
    } else {
      subtract_tile(rows, read, factors, across, y);
      load_all(x, y, TILE, TILE);
      dot_tile(rows, read, x, sums);
    }
    copy_out(y, columns, left, rest + place);
    __syncthreads();
  }
  T* part = second + reversed * static_cast<long long>(size);
  for (int k = threadIdx.x; k < size; k += blockDim.x) part[k] = sums[k];
}

// Shared memory: across (warps, TILE), y (WIDTH, TILE), factors (WIDTH, rows).
template <typename T>
__device__ void subtract(PARAMETERS(T)) {
  constexpr int TILE = Layout<T>::TILE;
  const long long token = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks, size = WIDTH * rows;
  T* across = reinterpret_cast<T*>(shared_memory());
  T* y = across + blockDim.x / LANES * TILE;
  T* factors = y + WIDTH * TILE;
  gather(second + token * blocks * size, blocks, size, factors);
  __syncthreads();
  if (block == 0)
    for (int k = threadIdx.x; k < size; k += blockDim.x) components[token * size + k] += factors[k];
  for (int tile = block * tiles; tile < (block + 1) * tiles && tile * TILE < columns; ++tile) {
    const int start = tile * TILE, left = columns - start;
    const T* q = basis + token * batch_stride + start;
    T* z = rest + token * WIDTH * columns + start;
    const auto read = [&](int i) { return load(q + i * row_stride, left); };
    copy_in(z, columns, left, y);
    subtract_tile(rows, read, factors, across, y);
    copy_out(y, columns, left, z);
  }
}

#ifdef CLUSTER
template <typename T>
__device__ void gather_cluster(const T* sums, int size, T* factors) {
  synchronise_cluster();
  for (int k = threadIdx.x; k < size; k += blockDim.x) {
    T sum = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) sum += read_from(sums + k, rank);
    factors[k] = sum;
  }
  __syncthreads();
}

// One cluster for a token, so blocks is CLUSTER. Shared memory: its tiles (tiles, rows, TILE),
// across (warps, TILE), y (tiles, WIDTH, TILE), factors and both passes' sums (WIDTH, rows).
template <typename T>
__device__ void on_chip(PARAMETERS(T)) {
  constexpr int TILE = Layout<T>::TILE;
  const long long token = blockIdx.x / CLUSTER;
  const int block = blockIdx.x % CLUSTER, size = WIDTH * rows;
  const int start = block * tiles * TILE, left = columns - start;
  T* kept = reinterpret_cast<T*>(shared_memory());
  T* across = kept + tiles * rows * TILE;
  T* y = across + blockDim.x / LANES * TILE;
  T* factors = y + tiles * WIDTH * TILE;
  T* sums = factors + size;
  clear(sums, 2 * size);
  __syncthreads();
  const T* q = basis + token * batch_stride + start;
  const long long place = token * WIDTH * columns + start;
  Strip<T> x[WIDTH];
  for (int tile = 0; tile < tiles && tile * TILE < left; ++tile) {
    const int begin = tile * TILE;
    load_all(x, X + place + begin, columns, left - begin);
    copy_in(X + place + begin, columns, left - begin, y + tile * WIDTH * TILE);
    const auto read_and_keep = [&](int i) {
      const Strip<T> strip = load(q + i * row_stride + begin, left - begin);
      store(kept + (tile * rows + i) * TILE, strip);
      return strip;
    };
    dot_tile(rows, read_and_keep, x, sums);
  }
  for (int pass = 0; pass < 2; ++pass) {
    gather_cluster(sums + pass * size, size, factors);
    if (block == 0)
      for (int k = threadIdx.x; k < size; k += blockDim.x)
        components[token * size + k] = factors[k] + (pass ? components[token * size + k] : T(0));
    for (int tile = 0; tile < tiles && tile * TILE < left; ++tile) {
      T* Y = y + tile * WIDTH * TILE;
      const auto read = [&](int i) { return load(kept + (tile * rows + i) * TILE, TILE); };
      subtract_tile(rows, read, factors, across, Y);
      if (pass == 0) {
        load_all(x, Y, TILE, TILE);
        dot_tile(rows, read, x, sums + size);
      } else {
        copy_out(Y, columns, left - tile * TILE, rest + place + tile * TILE);
      }
    }
  }
  synchronise_cluster();  // none leaves while another may still read its sums
}
#endif

#define KERNEL(NAME, T, TYPE)                                                     \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS) NAME##_##TYPE(PARAMETERS(T)) { \
    NAME<T>(ARGUMENTS);                                                           \
  }
KERNEL(dot, float, float32)
KERNEL(dot, double, float64)
KERNEL(fused, float, float32)
KERNEL(fused, double, float64)
KERNEL(subtract, float, float32)
KERNEL(subtract, double, float64)

#ifdef CLUSTER
#define CLUSTER_KERNEL(T, TYPE)                                                              \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(MAX_THREADS) \
      on_chip_##TYPE(PARAMETERS(T)) {                                                        \
    on_chip<T>(ARGUMENTS);                                                                   \
  }
CLUSTER_KERNEL(float, float32)
CLUSTER_KERNEL(double, float64)
#endif
