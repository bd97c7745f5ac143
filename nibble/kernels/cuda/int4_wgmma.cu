// int4_linear for sm_90a: the same op as int4_linear.cu, which says what is computed, with bulk copies and, for more than
// 16 tokens, warpgroup products (m64nNk16: 64 rows of weights dequantised into registers x N tokens in shared memory).
//
// Work: the matrix is cut into units of 256 rows x 128 columns, in row-major order of units. A run of consecutive units
// belongs to one worker, all runs equally long (+- 1), and a worker is a pair of thread blocks, one for each half of the
// rows. So every multiprocessor streams the same number of bytes whatever the shape; where a run ends in the middle of
// a row group, the sums of the workers that share the group are added up by the last of them to arrive, in order of K.
//
// Batch invariance: the runs depend on the weight's shape alone (not on the device either). What a run has of a row
// group is added up in two sums, every other unit in order of K in the tensor core's accumulators, then both together;
// an element of a product does not depend on the other columns, and has the same bits by mma.sync and by wgmma.
//
// Thread block: 16 warps that multiply and one of which a thread feeds them. Warp i of a team of 8 owns 16 rows of the
// block's 128; the two teams take turns at the units, and meet in shared memory at the end of a row group. Two warps per
// fragment, because one at a time could not hide the latency of its own loads and products. For up to 16 tokens they
// are independent of each other (mma.sync), beyond that four form a warpgroup.
//
// A ring of stages holds a unit each: two tiles of weights and the tokens' 128 columns, counted by one barrier, so that
// the loop pays for one wait per unit. Everything that does not depend on the kernel before, i.e. the first stages'
// weights, is under way before grid_wait(), and the next kernel is let in once the last unit was asked for: its first
// weights follow ours without a gap, if its blocks find room beside ours (BLOCKS == 2: half the shared memory and half
// the registers). From 32 tokens on the bytes of x count for as much as those of weights: the pair of blocks is a
// cluster then, each block fetches half of the tokens for both.
//
// Grid: (2 * workers, token chunks). Bytes: weights once per chunk, x once per worker, or per block up to 16 tokens.
#include "hopper.cuh"
#include "int4_tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define MEMBER __device__ __forceinline__

constexpr int TEAM = 2 * WARPGROUP;  // threads: 128 rows
constexpr int TEAMS = 2;
constexpr int CONSUMERS = TEAMS * TEAM;
// Registers of a thread where a block has a multiprocessor to itself: three of the four warps that do not multiply are
// there only to leave theirs to the others
constexpr int MANY_REGISTERS = 112, FEW_REGISTERS = 32;  // 512 * 112 + 128 * 32 = 640 * 96
constexpr int ROW_TILES = 4;  // of a unit: two per block
constexpr int BLOCK_TILES = 2;
constexpr int WEIGHT_BYTES = BLOCK_TILES * TILE_BYTES;
constexpr int PANEL_COLUMNS = 64;  // of x: 128 bytes per token, swizzled
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

// A stage of the ring, and the parity of its barriers in this round
template <int STAGES>
struct Place {
    int slot = 0, parity = 0;

    MEMBER void advance(int by = 1) {
        slot += by;
        if (slot >= STAGES) slot -= STAGES, parity ^= 1;
    }
};

template <int TOKENS, int BLOCKS>
struct Kernel {
    static constexpr bool CLUSTER = TOKENS > 16;
    static constexpr int THREADS = CONSUMERS + (BLOCKS == 1 ? WARPGROUP : WARP);
    static constexpr int PANEL_BYTES = TOKENS * PANEL_COLUMNS * 2;
    static constexpr int X_BYTES = PANELS * PANEL_BYTES;
    static constexpr int FINISHERS = TOKENS >= 16 ? TEAMS : 1;  // teams with tokens of their own at the end
    static constexpr int SHARE = TOKENS / 8 / FINISHERS;        // of a team, in eights
    static constexpr int MEETING_BYTES = TOKENS / 8 * TEAM * 16;
    // As many stages as BLOCKS blocks of a multiprocessor find room for; int4_wgmma.py has the same formula
    static constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + 2 * 8;
    static constexpr int STAGES = ((228 / BLOCKS - 1) * 1024 - MEETING_BYTES - 8) / STAGE_BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + MEETING_BYTES + 8;

    const Problem& p;
    const TensorMap& x_map;
    uint32 x, weights, meeting, full, empty;  // in shared memory
    uint32* is_last;                          // per warpgroup of the first team
    int num_tiles, num_row_tiles, first_unit, num_units, total_units;

    MEMBER Kernel(const Problem& problem, const TensorMap& map) : p(problem), x_map(map) {
        extern __shared__ __align__(1024) uint8 shared[];
        x = shared_address(shared);
        weights = x + STAGES * X_BYTES;
        meeting = weights + STAGES * WEIGHT_BYTES;
        full = meeting + MEETING_BYTES;
        empty = full + STAGES * 8;
        is_last = reinterpret_cast<uint32*>(shared + SHARED_BYTES - 8);
        num_tiles = (p.num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        num_row_tiles = (p.epilogue.num_rows + TILE_ROWS - 1) / TILE_ROWS;
        total_units = (num_row_tiles + ROW_TILES - 1) / ROW_TILES * num_tiles;
        const int worker = block_x() / 2;
        first_unit = worker * total_units / p.num_workers;
        num_units = (worker + 1) * total_units / p.num_workers - first_unit;
    }

    // Asked for again where they are needed: in registers all along they cost more
    static MEMBER int block_x() {
        int x;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
        return x;
    }
    static MEMBER int worker() { return block_x() / 2; }
    static MEMBER int half() { return block_x() % 2; }
    static MEMBER int chunk() {
        int y;
        asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
        return y;
    }

    MEMBER void init_barriers() const {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(full + i * 8, 2);  // weights and x
            init_barrier(empty + i * 8, TEAM / WARP * (CLUSTER ? 2 : 1));
        }
        fence_barrier_init();
    }

    // Of a tile; a group of 128 columns does not fit a ragged one
    MEMBER int width(int tile) const {
        return GROUP_SIZE == TILE_COLUMNS ? TILE_COLUMNS : min(TILE_COLUMNS, p.num_columns - tile * TILE_COLUMNS);
    }

    // ---- the thread that feeds -----------------------------------------------------------------------------------------

    // Asks for units of weights, one after the other
    struct Weights {
        const Kernel& k;
        const uint8* source;  // of the block's first row tile and the next column tile
        int64 row_stride;
        int left, tile, row_tile;
        Place<STAGES> place;

        MEMBER explicit Weights(const Kernel& kernel) : k(kernel) {
            row_stride = row_tile_bytes(k.p.num_columns);
            left = k.num_units, tile = k.first_unit % k.num_tiles;
            row_tile = k.first_unit / k.num_tiles * ROW_TILES + k.half() * BLOCK_TILES;
            source = k.p.packed + row_tile * row_stride + int64(tile) * TILE_BYTES;
        }

        MEMBER void copy() {
            if (left == 0) return;
            const int bytes = tile_bytes(k.width(tile)), count = min(max(k.num_row_tiles - row_tile, 0), BLOCK_TILES);
            const uint32 target = k.weights + place.slot * WEIGHT_BYTES, barrier = k.full + place.slot * 8;
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

    // In a cluster this block's half of the tokens, for both blocks; the other half comes from the other block
    MEMBER void copy_x(int slot, int tile) const {
        arrive_and_expect(full + slot * 8, X_BYTES);
#pragma unroll
        for (int h = 0; h < PANELS; h++) {
            const uint32 target = x + slot * X_BYTES + h * PANEL_BYTES;
            const int column = tile * TILE_COLUMNS + h * PANEL_COLUMNS, token = chunk() * TOKENS;
            if constexpr (CLUSTER)
                copy_box_to_both(target + half() * (PANEL_BYTES / 2), x_map, column, token + half() * (TOKENS / 2),
                                 full + slot * 8);
            else
                copy_box(target, x_map, column, token, full + slot * 8);
        }
    }

    MEMBER void feed() const {
        Weights next(*this);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) next.copy();
        if constexpr (CLUSTER) cluster_wait();
        grid_wait();
        Place<STAGES> place;
        int tile = first_unit % num_tiles;
#pragma unroll 1
        for (int i = 0; i < num_units; i++) {
            if (i >= STAGES) {
                wait_barrier(empty + place.slot * 8, place.parity ^ 1);
                next.copy();
            }
            copy_x(place.slot, tile);
            place.advance();
            if (++tile == num_tiles) tile = 0;
        }
    }

    // ---- the warps that multiply ---------------------------------------------------------------------------------------

    // A warp's 16 rows of a tile, and where a lane finds its own
    struct Fragments {
        static constexpr int HALVES = TILE_COLUMNS / 32;
        uint32 words[PANELS][STEPS], scales, scale[2], minimum[2];
        int columns;

        MEMBER void load(uint32 tile, int warp, int lane, int num_columns) {
            columns = num_columns;
            const uint32 nibbles = tile + warp * 8 * columns + lane * 16;
            scales = tile + columns * (TILE_ROWS / 2) + (warp * 16 + lane / 4) * 4;
#pragma unroll
            for (int h = 0; h < PANELS; h++)  // ldmatrix of consecutive 16-byte rows: lane l gets the l-th word of 128 bytes
                load_matrices(words[h], nibbles + h * 512);
        }

        // 16 x 16 weights, asked for in order of columns
        MEMBER void get(uint32 (&a)[4], int h, int step) {
            const int column = h * PANEL_COLUMNS + step * 16;
            if (column % GROUP_SIZE == 0) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    uint32 both = load_shared(scales + column / GROUP_SIZE * GROUP_BYTES + r * 32);
                    if (GROUP_SIZE < TILE_COLUMNS && column >= columns) both = 0;  // past a ragged tile: weights of zero
                    scale[r] = broadcast_low(both);
                    minimum[r] = broadcast_high(both);
                }
            }
            uint32 q[4];
            unpack(q, words[h][step]);
            scale_fragment(a, q, scale, minimum);
        }
    };

    // sums += a unit
    MEMBER void multiply_by_warps(float (&sums)[TOKENS / 8][4], Fragments& fragments, uint32 panels, int lane) const {
        const uint32 first = panels + lane % 8 * 128 + ((lane / 8) ^ (lane & 7)) * 16;  // token l % 8, 8 columns at 8 (l / 8)
        const uint32 second = first ^ 64;                                               // 32 columns on
#pragma unroll
        for (int h = 0; h < PANELS; h++) {
#pragma unroll
            for (int pair = 0; pair < STEPS / 2; pair++) {
                uint32 b[TOKENS / 8][4];
#pragma unroll
                for (int n = 0; n < TOKENS / 8; n++)
                    load_matrices(b[n], (pair ? second : first) + h * PANEL_BYTES + n * 1024);
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32 a[4];
                    fragments.get(a, h, pair * 2 + s);
#pragma unroll
                    for (int n = 0; n < TOKENS / 8; n++) mma_16816(sums[n], a, b[n][s * 2], b[n][s * 2 + 1]);
                }
            }
        }
    }

    // The same with wgmma; ptxas lets nothing define an operand of a product while others are under way (it serialises
    // them instead): another warp's turn
    MEMBER void multiply_by_groups(float (&sums)[TOKENS / 8][4], Fragments& fragments, uint32 panels) const {
        float(&flat)[TOKENS / 2] = reinterpret_cast<float(&)[TOKENS / 2]>(sums);
#pragma unroll
        for (int h = 0; h < PANELS; h++) {
            uint32 a[STEPS][4];
#pragma unroll
            for (int step = 0; step < STEPS; step++) fragments.get(a[step], h, step);
            pin(a);
            const uint64 b = panel_descriptor(panels + h * PANEL_BYTES);
            fence_products();
#pragma unroll
            for (int step = 0; step < STEPS; step++) multiply(flat, a[step], b + step * 2);
            commit_products();
            wait_products<0>();
            pin(flat);
        }
    }

    MEMBER void work() const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, group = threadIdx.x / WARPGROUP % BLOCK_TILES;
        const int team = __shfl_sync(FULL_WARP, threadIdx.x / TEAM, 0);
        const uint32 my_weights = weights + group * TILE_BYTES;
        uint32 my_empty = empty;  // in a cluster: lane 0 and 1 arrive at the first and at the second block's
        if constexpr (CLUSTER) {
            cluster_wait();
            my_empty = address_in_cluster(empty, lane & 1);
        }
        Place<STAGES> place;
        place.advance(team);
        int tile = first_unit % num_tiles, i = team;
        grid_wait();
        for (int start = 0; start < num_units;) {  // a row group, or what this worker has of it
            const int stop = min(num_units, start + num_tiles - tile);
            float sums[TOKENS / 8][4] = {};
#pragma unroll 1
            for (; i < stop; i += TEAMS) {
                Fragments fragments;
                wait_barrier(full + place.slot * 8, place.parity);
                fragments.load(my_weights + place.slot * WEIGHT_BYTES, warp, lane, width(tile + i - start));
                if constexpr (TOKENS <= 16)
                    multiply_by_warps(sums, fragments, x + place.slot * X_BYTES, lane);
                else
                    multiply_by_groups(sums, fragments, x + place.slot * X_BYTES);
                __syncwarp();
                if constexpr (CLUSTER) {
                    // Nobody waits for the last ones, and the other block may be gone
                    if (lane < 2 && i + STAGES < num_units) arrive_in_cluster(my_empty + place.slot * 8);
                } else if (lane == 0) {
                    arrive(my_empty + place.slot * 8);
                }
                place.advance(TEAMS);
            }
            float mine[SHARE][4];
            meet(mine, sums, team);
            if (team < FINISHERS) finish(mine, first_unit + stop - 1, team);
            start = stop, tile = 0;
        }
    }

    // Adds both teams' sums: a team gets its share of the tokens, the first has them all where there are but 8
    MEMBER void meet(float (&mine)[SHARE][4], const float (&sums)[TOKENS / 8][4], int team) const {
        const uint32 place = meeting + threadIdx.x % TEAM * 16;
        const int barrier = 1 + BLOCK_TILES + threadIdx.x % TEAM / WARP;
        constexpr int SECOND = TOKENS / 8 - SHARE;  // where the second team's begins
#pragma unroll
        for (int j = 0; j < SHARE; j++) {
            if (team)
                store_shared(place + (SECOND + j) * (TEAM * 16), sums[j]);
            else if (SECOND)
                store_shared(place + j * (TEAM * 16), sums[SECOND + j]);
        }
        sync_threads<2 * WARP>(barrier);
#pragma unroll
        for (int j = 0; j < SHARE; j++) {
            float other[4] = {};
            if (SECOND || !team) load_shared(other, place + ((team ? 0 : SECOND) + j) * (TEAM * 16));
#pragma unroll
            for (int k = 0; k < 4; k++) mine[j][k] = (team ? sums[SECOND + j][k] : sums[j][k]) + other[k];
        }
        sync_threads<2 * WARP>(barrier);  // the place is free again
    }

    // The worker of a unit
    MEMBER int owner(int unit) const { return ((unit + 1) * p.num_workers - 1) / total_units; }

    // A team's sums of a run of units that ends with `unit`
    MEMBER void finish(float (&sums)[SHARE][4], int unit, int team) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
        const int group = threadIdx.x / WARPGROUP % BLOCK_TILES;
        const int row_group = unit / num_tiles, row_tile = row_group * ROW_TILES + half() * BLOCK_TILES + group;
        const int token = chunk() * TOKENS + team * SHARE * 8 + lane % 4 * 2;
        if (row_tile >= num_row_tiles) return;
        const int first = owner(row_group * num_tiles), last = owner((row_group + 1) * num_tiles - 1);
        if (first == last || add_partials(sums, row_tile, first, last, p.epilogue.num_tokens - token))
            store(p.epilogue, token, row_tile * TILE_ROWS + warp * 16 + lane / 4, sums);
        __syncwarp();
    }

    MEMBER float4* partials(int owner, bool is_first) const {
        const int block = ((chunk() * p.num_workers + owner) * 2 + is_first) * 2 + half();
        const int group = threadIdx.x / WARPGROUP % BLOCK_TILES, team = threadIdx.x / TEAM;
        return p.partials + int64(block) * (TOKENS / 8 * TEAM) + group * (TOKENS / 8 * WARPGROUP) +
               team * (SHARE * WARPGROUP) + threadIdx.x % WARPGROUP;
    }

    // Leaves this worker's sums for the others of the row tile, first .. last. The last to arrive gets all of them added
    // up, and true. num_tokens: from this lane's first one on.
    MEMBER bool add_partials(float (&sums)[SHARE][4], int row_tile, int first, int last, int num_tokens) const {
        const int group = threadIdx.x / WARPGROUP % BLOCK_TILES;
        float4* mine = partials(worker(), worker() == first);
#pragma unroll
        for (int j = 0; j < SHARE; j++)
            if (j * 8 < num_tokens) mine[j * WARPGROUP] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
        fence_device();
        sync_threads<FINISHERS * WARPGROUP>(1 + group);
        if (threadIdx.x / TEAM == 0 && threadIdx.x % WARPGROUP == 0) {
            uint32* arrivals = p.arrivals + chunk() * num_row_tiles + row_tile;
            const bool all = atomicAdd(arrivals, 1) == last - first;
            if (all) *arrivals = 0;
            is_last[group] = all;
        }
        sync_threads<FINISHERS * WARPGROUP>(1 + group);
        if (!*reinterpret_cast<volatile uint32*>(is_last + group)) return false;
        fence_device();
        constexpr int BATCH = TOKENS == 16 || SHARE == 4 ? 3 : SHARE <= 2 ? 4 : 1;  // workers, loaded together
#pragma unroll
        for (int j = 0; j < SHARE; j++) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0;
#pragma unroll 1
        for (int start = first; start <= last; start += BATCH) {
            float4 parts[BATCH][SHARE];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int j = 0; j < SHARE; j++) {
                    parts[i][j] = make_float4(0, 0, 0, 0);  // adds nothing, exactly
                    if (start + i <= last && j * 8 < num_tokens)
                        parts[i][j] = __ldcg(partials(start + i, start + i == first) + j * WARPGROUP);
                }
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
#pragma unroll
                for (int j = 0; j < SHARE; j++) {
                    sums[j][0] += parts[i][j].x, sums[j][1] += parts[i][j].y;
                    sums[j][2] += parts[i][j].z, sums[j][3] += parts[i][j].w;
                }
            }
        }
        return true;
    }
};

template <int TOKENS, int BLOCKS>
DEVICE void int4_wgmma(const Problem& p, const TensorMap& x_map) {
    const Kernel<TOKENS, BLOCKS> kernel(p, x_map);
    if (threadIdx.x == 0) kernel.init_barriers();
    __syncthreads();
    if constexpr (kernel.CLUSTER) cluster_arrive();
    // The compiler must see that whole warps take a branch with warpgroup products
    if (__shfl_sync(FULL_WARP, threadIdx.x / WARP, 0) < CONSUMERS / WARP) {
        if constexpr (BLOCKS == 1) take_registers<MANY_REGISTERS>();
        kernel.work();
    } else {
        if constexpr (BLOCKS == 1) leave_registers<FEW_REGISTERS>();
        if (threadIdx.x == CONSUMERS) {
            kernel.feed();
        } else {
            if constexpr (kernel.CLUSTER) cluster_wait();
            grid_wait();
        }
    }
}

#define INT4_WGMMA(TOKENS, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(Kernel<TOKENS, BLOCKS>::THREADS, BLOCKS)                              \
        int4_wgmma_##TOKENS(                                                                                            \
        const __grid_constant__ TensorMap x_map, const uint8* __restrict__ packed, const float* __restrict__ bias,      \
        uint16* out, float* residual, float4* partials, uint32* arrivals, int num_tokens, int num_rows,                 \
        int num_columns, int num_workers, int gated) {                                                                  \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        int4_wgmma<TOKENS, BLOCKS>({packed, epilogue, partials, arrivals, num_columns, num_workers}, x_map);            \
    }

// int4_wgmma.py has the same numbers
INT4_WGMMA(8, 2)
INT4_WGMMA(16, 2)
INT4_WGMMA(32, 1)
INT4_WGMMA(64, 1)
INT4_WGMMA(128, 1)

#endif
