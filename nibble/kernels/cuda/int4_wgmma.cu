// int4_linear for sm_90a: the same op as int4_linear.cu, which says what is computed, with bulk copies and warpgroup
// products (m64nNk16: 64 rows of weights dequantised into registers x N tokens in shared memory).
//
// Work: the matrix is cut into units of 256 rows x 128 columns, in row-major order of units. A run of consecutive units
// belongs to one worker, all runs equally long (+- 1), and a worker is a pair of thread blocks, one for each half of the
// rows. So every multiprocessor streams the same number of bytes whatever the shape; where a run ends in the middle of
// a row group, the sums of the workers that share the group are added up by the last of them to arrive, in order of K.
//
// Batch invariance: the runs depend on the weight's shape alone (not on the device either), the columns of a run are
// added in order in the tensor core's accumulators, and an element of a product does not depend on the other columns.
//
// Thread block: two warpgroups that multiply (64 rows x TOKENS each; warp i of a group owns rows 16 i .. 16 i + 15 of
// the row tile) and one warp of which a thread feeds them: weights, two tiles a unit, go through a ring of WEIGHT_STAGES
// units; x goes through a ring of X_STAGES panels of 64 columns. Everything that does not depend on the kernel before,
// i.e. the first WEIGHT_STAGES units of weights, is under way before grid_wait(), and the next kernel is let in once
// the last unit was asked for: its first weights follow ours without a gap, if its blocks find room beside ours (for up
// to 64 tokens: half the shared memory and half the registers).
//
// A group works on panels: while the tensor core multiplies one, it unpacks the next; the scales come after the wait,
// since ptxas lets nothing define an operand of a product while others are under way (it serialises them instead).
//
// Grid: (2 * workers, token chunks). Bytes: weights once per chunk, x once per block.
#include "hopper.cuh"
#include "int4_tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define MEMBER __device__ __forceinline__

constexpr int GROUPS_OF_WARPS = 2;
constexpr int CONSUMERS = GROUPS_OF_WARPS * WARPGROUP;
constexpr int THREADS = CONSUMERS + WARP;
constexpr int ROW_TILES = 4;  // of a unit: two per block
constexpr int WEIGHT_BYTES = GROUPS_OF_WARPS * TILE_BYTES;
constexpr int PANEL_COLUMNS = 64;
constexpr int PANELS = TILE_COLUMNS / PANEL_COLUMNS;
constexpr int STEPS = PANEL_COLUMNS / 16;

struct Problem {
    const uint8* packed;
    Epilogue epilogue;
    float4* partials;  // (chunks, workers, begins in the group's middle or not, 2 blocks, groups, TOKENS / 8, 128 threads)
    uint32* arrivals;  // (chunks, row tiles)
    int num_columns;
    int num_workers;
};

// A stage of a ring, and the parity of its barriers in this round
template <int STAGES>
struct Place {
    int slot = 0, parity = 0;

    MEMBER void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

template <int TOKENS, int WEIGHT_STAGES, int X_STAGES>
struct Kernel {
    static constexpr int X_BYTES = TOKENS * PANEL_COLUMNS * 2;
    static constexpr int SHARED_BYTES =
        X_STAGES * X_BYTES + WEIGHT_STAGES * WEIGHT_BYTES + (2 * X_STAGES + WEIGHT_STAGES) * 8 + 8;

    const Problem& p;
    const TensorMap& x_map;
    uint32 x, weights, x_full, x_empty, weights_full;  // in shared memory
    uint32* is_last;                                   // per warpgroup
    int num_tiles, num_row_tiles, first_unit, num_units, total_units, half, chunk, worker;

    MEMBER Kernel(const Problem& problem, const TensorMap& map) : p(problem), x_map(map) {
        extern __shared__ __align__(1024) uint8 shared[];
        x = shared_address(shared);
        weights = x + X_STAGES * X_BYTES;
        x_full = weights + WEIGHT_STAGES * WEIGHT_BYTES;
        x_empty = x_full + X_STAGES * 8;
        weights_full = x_empty + X_STAGES * 8;
        is_last = reinterpret_cast<uint32*>(shared + SHARED_BYTES - 8);
        num_tiles = (p.num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        num_row_tiles = (p.epilogue.num_rows + TILE_ROWS - 1) / TILE_ROWS;
        total_units = (num_row_tiles + ROW_TILES - 1) / ROW_TILES * num_tiles;
        worker = blockIdx.x / 2, half = blockIdx.x % 2, chunk = blockIdx.y;
        first_unit = worker * total_units / p.num_workers;
        num_units = (worker + 1) * total_units / p.num_workers - first_unit;
    }

    MEMBER void init_barriers() const {
        for (int i = 0; i < X_STAGES; i++) {
            init_barrier(x_full + i * 8, 1);
            init_barrier(x_empty + i * 8, CONSUMERS / WARP);
        }
        for (int i = 0; i < WEIGHT_STAGES; i++) init_barrier(weights_full + i * 8, 1);
        fence_barrier_init();
    }

    MEMBER int width(int tile) const { return min(TILE_COLUMNS, p.num_columns - tile * TILE_COLUMNS); }

    // ---- the thread that feeds -----------------------------------------------------------------------------------------

    // Asks for units of weights, one after the other
    struct Weights {
        const Kernel& k;
        const uint8* source;  // of the block's first row tile and the next column tile
        int64 row_stride;
        int left, tile, row_tile;
        Place<WEIGHT_STAGES> place;

        MEMBER explicit Weights(const Kernel& kernel) : k(kernel) {
            row_stride = row_tile_bytes(k.p.num_columns);
            left = k.num_units, tile = k.first_unit % k.num_tiles;
            row_tile = k.first_unit / k.num_tiles * ROW_TILES + k.half * GROUPS_OF_WARPS;
            source = k.p.packed + row_tile * row_stride + int64(tile) * TILE_BYTES;
        }

        MEMBER void copy() {
            if (left == 0) return;
            const int bytes = tile_bytes(k.width(tile)), count = min(max(k.num_row_tiles - row_tile, 0), GROUPS_OF_WARPS);
            const uint32 target = k.weights + place.slot * WEIGHT_BYTES, barrier = k.weights_full + place.slot * 8;
            arrive_and_expect(barrier, count * bytes);
            if (count > 0) copy_bulk(target, source, bytes, barrier);
            if (count > 1) copy_bulk(target + TILE_BYTES, source + row_stride, bytes, barrier);
            place.advance();
            source += bytes;
            if (++tile == k.num_tiles) {
                tile = 0, row_tile += ROW_TILES;
                source += (ROW_TILES - 1) * row_stride;
            }
            if (--left == 0) grid_launch_dependents();
        }
    };

    MEMBER void feed() const {
        Weights next(*this);
#pragma unroll 1
        for (int i = 0; i < WEIGHT_STAGES; i++) next.copy();
        grid_wait();
        Place<X_STAGES> place;
        int tile = first_unit % num_tiles;
#pragma unroll 1
        for (int i = 0; i < num_units; i++) {
#pragma unroll
            for (int h = 0; h < PANELS; h++) {
                if (i * PANELS + h >= X_STAGES) {
                    wait_barrier(x_empty + place.slot * 8, place.parity ^ 1);
                    if (h == PANELS - 1) next.copy();  // X_STAGES is even: the panel before in this place ended a unit
                }
                arrive_and_expect(x_full + place.slot * 8, X_BYTES);
                copy_box(x + place.slot * X_BYTES, x_map, tile * TILE_COLUMNS + h * PANEL_COLUMNS, chunk * TOKENS,
                         x_full + place.slot * 8);
                place.advance();
            }
            if (++tile == num_tiles) tile = 0;
        }
    }

    // ---- the warpgroups that multiply ----------------------------------------------------------------------------------

    // A panel of weights in registers, before scaling
    struct Panel {
        static constexpr int SCALES = PANEL_COLUMNS > GROUP_SIZE ? PANEL_COLUMNS / GROUP_SIZE : 1;
        uint32 q[STEPS][4], scale[SCALES][2], minimum[SCALES][2];

        // Panel h of a tile of `columns`; nibbles and scales: where this lane finds its own
        MEMBER void load(uint32 nibbles, uint32 scales, int h, int columns) {
            uint32 words[STEPS];  // ldmatrix of consecutive 16-byte rows: lane l gets the l-th word of each 128 bytes
            load_matrices(words, nibbles + h * 512);
#pragma unroll
            for (int s = 0; s < SCALES; s++) {
                const int column = h * PANEL_COLUMNS + s * GROUP_SIZE;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    uint32 both = load_shared(scales + column / GROUP_SIZE * GROUP_BYTES + r * 32);
                    if (column >= columns) both = 0;  // past a ragged tile: weights of zero
                    scale[s][r] = broadcast_low(both);
                    minimum[s][r] = broadcast_high(both);
                }
            }
#pragma unroll
            for (int step = 0; step < STEPS; step++) unpack(q[step], words[step]);
        }

        MEMBER void scale_all(uint32 (&a)[STEPS][4]) const {
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                scale_fragment(a[step], q[step], scale[step * 16 / GROUP_SIZE], minimum[step * 16 / GROUP_SIZE]);
        }
    };

    MEMBER void work() const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, group = threadIdx.x / WARPGROUP;
        const uint32 my_weights = weights + group * TILE_BYTES;
        Place<WEIGHT_STAGES> place;
        Place<X_STAGES> x_place;
        uint32 to_release = 0;  // barrier of the panel that is being multiplied
        int tile = first_unit % num_tiles, i = 0;
        Panel panel;
        // The next unit's panel h
        const auto load = [&](int h) {
            const int columns = width(tile);
            const uint32 start = my_weights + place.slot * WEIGHT_BYTES;
            if (h == 0) wait_barrier(weights_full + place.slot * 8, place.parity);
            panel.load(start + warp * 8 * columns + lane * 16,
                       start + columns * (TILE_ROWS / 2) + (warp * 16 + lane / 4) * 4, h, columns);
        };
        load(0);
        grid_wait();
        while (i < num_units) {  // a row group, or what this worker has of it
            const int stop = min(num_units, i + num_tiles - tile);
            float sums[TOKENS / 8][4];
            float(&flat)[TOKENS / 2] = reinterpret_cast<float(&)[TOKENS / 2]>(sums);
#pragma unroll
            for (int j = 0; j < TOKENS / 2; j++) flat[j] = 0;
#pragma unroll 1
            for (; i < stop; i++) {
#pragma unroll
                for (int h = 0; h < PANELS; h++) {
                    uint32 a[STEPS][4];
                    wait_barrier(x_full + x_place.slot * 8, x_place.parity);
                    wait_products<0>();  // of the panel before
                    if (to_release && lane == 0) arrive(to_release);
                    to_release = x_empty + x_place.slot * 8;
                    panel.scale_all(a);
                    pin(a);
                    const uint64 b = panel_descriptor(x + x_place.slot * X_BYTES);
                    fence_products();
#pragma unroll
                    for (int step = 0; step < STEPS; step++) multiply(flat, a[step], b + step * 2);
                    commit_products();
                    x_place.advance();
                    if (h + 1 < PANELS) {
                        load(h + 1);
                    } else {
                        place.advance();
                        if (++tile == num_tiles) tile = 0;
                        if (i + 1 < num_units) load(0);
                    }
                    pin(panel.q);
                }
            }
            wait_products<0>();
            pin(flat);
            finish(sums, first_unit + stop - 1);
        }
    }

    // The same with mma.sync, whose elements have the same bits: its warps need not wait for each other, and for few
    // tokens that counts for more than its lower throughput.
    MEMBER void work_by_warps() const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, group = threadIdx.x / WARPGROUP;
        Place<WEIGHT_STAGES> place;
        Place<X_STAGES> x_place;
        int tile = first_unit % num_tiles, i = 0;
        grid_wait();
        while (i < num_units) {
            const int stop = min(num_units, i + num_tiles - tile);
            float sums[TOKENS / 8][4] = {};
#pragma unroll 1
            for (; i < stop; i++) {
                const int columns = width(tile);
                const uint32 start = weights + place.slot * WEIGHT_BYTES + group * TILE_BYTES;
                Panel panel[PANELS];
                wait_barrier(weights_full + place.slot * 8, place.parity);
#pragma unroll
                for (int h = 0; h < PANELS; h++)
                    panel[h].load(start + warp * 8 * columns + lane * 16,
                                  start + columns * (TILE_ROWS / 2) + (warp * 16 + lane / 4) * 4, h, columns);
#pragma unroll
                for (int h = 0; h < PANELS; h++) {
                    uint32 a[STEPS][4], b[TOKENS / 8][STEPS / 2][4];
                    wait_barrier(x_full + x_place.slot * 8, x_place.parity);
#pragma unroll
                    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
                        for (int pair = 0; pair < STEPS / 2; pair++)  // lane l: token l % 8, 8 columns at 8 (l / 8)
                            load_matrices(b[n][pair], x + x_place.slot * X_BYTES + (n * 8 + lane % 8) * 128 +
                                                          ((pair * 4 + lane / 8) ^ (lane & 7)) * 16);
                    }
                    panel[h].scale_all(a);
#pragma unroll
                    for (int step = 0; step < STEPS; step++) {
#pragma unroll
                        for (int n = 0; n < TOKENS / 8; n++)
                            mma_16816(sums[n], a[step], b[n][step / 2][step % 2 * 2], b[n][step / 2][step % 2 * 2 + 1]);
                    }
                    __syncwarp();
                    if (lane == 0) arrive(x_empty + x_place.slot * 8);
                    x_place.advance();
                }
                place.advance();
                if (++tile == num_tiles) tile = 0;
            }
            finish(sums, first_unit + stop - 1);
        }
    }

    // The worker of a unit
    MEMBER int owner(int unit) const { return ((unit + 1) * p.num_workers - 1) / total_units; }

    // Sums of a run of units that ends with `unit`
    MEMBER void finish(float (&sums)[TOKENS / 8][4], int unit) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, group = threadIdx.x / WARPGROUP;
        const int row_group = unit / num_tiles, row_tile = row_group * ROW_TILES + half * GROUPS_OF_WARPS + group;
        const int token = chunk * TOKENS + lane % 4 * 2;
        if (row_tile >= num_row_tiles) return;
        const int first = owner(row_group * num_tiles), last = owner((row_group + 1) * num_tiles - 1);
        if (first == last || add_partials(sums, row_tile, first, last, p.epilogue.num_tokens - token))
            store(p.epilogue, token, row_tile * TILE_ROWS + warp * 16 + lane / 4, sums);
        __syncwarp();
    }

    MEMBER float4* partials(int owner, bool is_first) const {
        const int block = ((chunk * p.num_workers + owner) * 2 + is_first) * 2 + half;
        return p.partials + int64(block) * (TOKENS / 8 * CONSUMERS) + threadIdx.x / WARPGROUP * (TOKENS / 8 * WARPGROUP) +
               threadIdx.x % WARPGROUP;
    }

    // Leaves this worker's sums for the others of the row tile, first .. last. The last to arrive gets all of them added
    // up, and true. num_tokens: from this lane's first one on.
    MEMBER bool add_partials(float (&sums)[TOKENS / 8][4], int row_tile, int first, int last, int num_tokens) const {
        const int group = threadIdx.x / WARPGROUP;
        float4* mine = partials(worker, worker == first);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
            if (j * 8 < num_tokens) mine[j * WARPGROUP] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
        fence_device();
        sync_warpgroup(1 + group);
        if (threadIdx.x % WARPGROUP == 0) {
            uint32* arrivals = p.arrivals + chunk * num_row_tiles + row_tile;
            const bool all = atomicAdd(arrivals, 1) == last - first;
            if (all) *arrivals = 0;
            is_last[group] = all;
        }
        sync_warpgroup(1 + group);
        if (!*reinterpret_cast<volatile uint32*>(is_last + group)) return false;
        fence_device();
        constexpr int BATCH = TOKENS <= 16 ? 4 : 1;  // workers whose sums are loaded together
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0;
#pragma unroll 1
        for (int start = first; start <= last; start += BATCH) {
            float4 parts[BATCH][TOKENS / 8];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) {
                    parts[i][j] = make_float4(0, 0, 0, 0);  // adds nothing, exactly
                    if (start + i <= last && j * 8 < num_tokens)
                        parts[i][j] = __ldcg(partials(start + i, start + i == first) + j * WARPGROUP);
                }
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) {
                    sums[j][0] += parts[i][j].x, sums[j][1] += parts[i][j].y;
                    sums[j][2] += parts[i][j].z, sums[j][3] += parts[i][j].w;
                }
            }
        }
        return true;
    }
};

template <int TOKENS, int WEIGHT_STAGES, int X_STAGES>
DEVICE void int4_wgmma(const Problem& p, const TensorMap& x_map) {
    const Kernel<TOKENS, WEIGHT_STAGES, X_STAGES> kernel(p, x_map);
    if (threadIdx.x == 0) kernel.init_barriers();
    __syncthreads();
    // The compiler must see that whole warps take a branch with warpgroup products
    if (__shfl_sync(FULL_WARP, threadIdx.x / WARPGROUP, 0) < GROUPS_OF_WARPS)
        if constexpr (TOKENS <= 16)
            kernel.work_by_warps();
        else
            kernel.work();
    else if (threadIdx.x == CONSUMERS)
        kernel.feed();
    else
        grid_wait();
}

#define INT4_WGMMA(TOKENS, BLOCKS, WEIGHT_STAGES, X_STAGES)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) int4_wgmma_##TOKENS(                                   \
        const __grid_constant__ TensorMap x_map, const uint8* __restrict__ packed, const float* __restrict__ bias,      \
        uint16* out, float* residual, float4* partials, uint32* arrivals, int num_tokens, int num_rows,                 \
        int num_columns, int num_workers, int gated) {                                                                  \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        int4_wgmma<TOKENS, WEIGHT_STAGES, X_STAGES>({packed, epilogue, partials, arrivals, num_columns, num_workers},   \
                                                    x_map);                                                             \
    }

// Stages: as many as leave half of a multiprocessor's 227 KB to the next kernel. int4_wgmma.py has the same numbers.
constexpr int SMALL = GROUP_SIZE == 32 ? 1 : 0;  // more bytes of scales
INT4_WGMMA(8, 2, 10 - SMALL, 20)
INT4_WGMMA(16, 2, 9 - SMALL, 16)
INT4_WGMMA(32, 2, 9 - SMALL, 8)
INT4_WGMMA(64, 2, 7 - SMALL, 6)
INT4_WGMMA(128, 1, 8, 8)

#endif
