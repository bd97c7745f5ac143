// int4_linear for up to 16 tokens on sm_90a: the same op as int4_linear.cu, which says what is computed, with bulk copies
// and clusters. Bound by the bytes of the weights; what matters is that the copy engines never run dry, also from one
// kernel to the next. int4_hopper.cuh has the order of additions.
//
// Cluster: 2 thread blocks, each with half of the 8 slices of K, that share out the row tiles (64 rows) with the other
// clusters: as many as the device holds at once, all with the same number of row tiles (+- 1).
//
// Thread block: passes over one row tile x its 4 slices. 16 warps multiply (mma.sync), each on its own: 4 teams, one for
// each slice, of 4 warps, one for each 16 rows. At the end of a pass a warp sends its sums to the block of the cluster
// that finishes these rows, without waiting for anything, and goes on with the next pass. (Sums in device memory cost
// three dependent round trips of 1 to 2 us each at a kernel's end, while the next kernel's weights pour in.) Two warps
// finish, a thread of one warp asks for weights, one of another for x.
//
// A ring of stages holds a unit each: two tiles of one slice and the tokens' 256 columns. The first stages' weights are
// under way before grid_wait(). A block takes most of a multiprocessor's shared memory, so that a kernel's blocks spread
// evenly (two to one are slower, even if the next kernel's first weights then follow without a gap).
//
// Grid: (2 * clusters, token chunks). Bytes: weights once per chunk, x once per pass and block.
// H100 80GB HBM3, 1 token, group 128, chains of one shape (% of 3.02 TB/s): 28672x4096 86, 4096x14336 77, 6144x4096 53,
// 4096x4096 48; 8 tokens the same to 1 %.
#include "int4_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int CLUSTER = 2;
constexpr int TEAMS = SLICES / CLUSTER;
constexpr int TEAM_WARPS = TILE_ROWS / 16;
constexpr int CONSUMERS = TEAMS * TEAM_WARPS;  // warps
constexpr int FINISHERS = 2;
constexpr int THREADS = (CONSUMERS + FINISHERS + 2) * WARP;
constexpr int UNIT_TILES = 2;
constexpr int WEIGHT_BYTES = UNIT_TILES * TILE_BYTES;
constexpr int OWNED = TEAM_WARPS / CLUSTER;  // fragments of a pass that a block finishes
constexpr int PART_BYTES = WARP * 16;        // a fragment x 8 tokens
// Of a ring: two for each team. Bytes asked for ahead are bytes that everything else waits behind: 16 stages are slower,
// 4 are too few.
constexpr int STAGES = 8;
static_assert(STAGES % TEAMS == 0, "a stage belongs to one team, see Place");

struct Problem {
    const uint8* packed;
    Epilogue epilogue;
    int num_columns;
};

// A block's part of a matrix
struct Part {
    int first_row_tile, num_row_tiles, num_tiles, steps;
    int64 row_stride;

    MEMBER Part(int num_rows, int num_columns) {
        const int row_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS, num_clusters = gridDim.x / CLUSTER;
        const int cluster = blockIdx.x / CLUSTER;
        first_row_tile = cluster * row_tiles / num_clusters;
        num_row_tiles = (cluster + 1) * row_tiles / num_clusters - first_row_tile;
        num_tiles = (num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        steps = ((num_tiles + SLICES - 1) / SLICES + UNIT_TILES - 1) / UNIT_TILES;  // of the longest slice
        row_stride = row_tile_bytes(num_columns);
    }

    MEMBER int first(int team) const { return first_tile(blockIdx.x % CLUSTER * TEAMS + team, num_tiles); }
    // Of a step: 2, or what is left of the slice, or less than 1
    MEMBER int count(int team, int step) const {
        return min(UNIT_TILES, first(team + 1) - first(team) - step * UNIT_TILES);
    }
};

template <int TOKENS>
struct Kernel {
    static constexpr int PANEL_BYTES = TOKENS * PANEL_COLUMNS * 2;
    static constexpr int X_BYTES = UNIT_TILES * PANELS * PANEL_BYTES;
    static constexpr int RESULT_BYTES = OWNED * TOKENS / 8 * SLICES * PART_BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + 2 * 8;


    const Problem& p;
    const TensorMap& x_map;
    const Part part;
    uint32 x, weights, results, full, empty, received, taken;  // in shared memory

    MEMBER Kernel(const Problem& problem, const TensorMap& map)
        : p(problem), x_map(map), part(problem.epilogue.num_rows, problem.num_columns) {
        extern __shared__ __align__(1024) uint8 shared[];
        x = shared_address(shared);
        weights = x + STAGES * X_BYTES;
        results = weights + STAGES * WEIGHT_BYTES;
        full = results + RESULT_BYTES;
        empty = full + STAGES * 8;
        received = empty + STAGES * 8;
        taken = received + 8;
    }

    MEMBER void init_barriers() const {
        for (int i = threadIdx.x; i < STAGES; i += WARP) {
            init_barrier(full + i * 8, 2);  // weights and x
            init_barrier(empty + i * 8, TEAM_WARPS);
        }
        if (threadIdx.x == 0) {
            init_barrier(received, 1);
            init_barrier(taken, CLUSTER * FINISHERS);
        }
        fence_barrier_init();
    }

    // Of this chunk's tokens, in eights
    MEMBER int num_eights() const { return (min(TOKENS, p.epilogue.num_tokens - int(blockIdx.y) * TOKENS) + 7) / 8; }

    // ---- the threads that feed: units in order of passes, steps and teams ------------------------------------------------

    // Where a feeder is
    struct Unit {
        const Part& part;
        int pass = 0, step = 0, team = 0;

        MEMBER explicit Unit(const Part& p) : part(p) {}
        MEMBER bool exists() const { return pass < part.num_row_tiles; }
        MEMBER int tile() const { return part.first(team) + step * UNIT_TILES; }
        MEMBER int count() const { return part.count(team, step); }
        MEMBER void advance() {
            if (++team < TEAMS) return;
            team = 0;
            if (++step < part.steps) return;
            step = 0, pass++;
        }
        MEMBER const uint8* address(const uint8* packed) const {
            return packed + (part.first_row_tile + pass) * part.row_stride + int64(tile()) * TILE_BYTES;
        }
        MEMBER int bytes(int num_columns) const {
            return (count() - 1) * TILE_BYTES + tile_bytes(tile_width(tile() + count() - 1, num_columns));
        }
    };

    MEMBER void feed_weights() const {
        grid_launch_dependents();
        Place<STAGES> place;
        Unit unit(part);
#pragma unroll 1
        for (int i = 0; unit.exists(); i++, unit.advance(), place.advance()) {
            const uint32 barrier = full + place.slot * 8;
            if (i >= STAGES) wait_barrier(empty + place.slot * 8, place.parity ^ 1);
            if (unit.count() > 0) {
                const int bytes = unit.bytes(p.num_columns);
                arrive_and_expect(barrier, bytes);
                copy_bulk(weights + place.slot * WEIGHT_BYTES, unit.address(p.packed), bytes, barrier);
            } else {
                arrive(barrier);
            }
        }
    }

    MEMBER void feed_x() const {
        Place<STAGES> place;
        grid_wait();
        const int token = blockIdx.y * TOKENS;
        Unit unit(part);
#pragma unroll 1
        for (int i = 0; unit.exists(); i++, unit.advance(), place.advance()) {
            const uint32 barrier = full + place.slot * 8;
            if (i >= STAGES) wait_barrier(empty + place.slot * 8, place.parity ^ 1);
            if (unit.count() > 0) {
                arrive_and_expect(barrier, X_BYTES);
                copy_panels(x + place.slot * X_BYTES, x_map, unit.tile() * PANELS, token, barrier);
            } else {
                arrive(barrier);
            }
        }
    }

    // ---- the warps that multiply ---------------------------------------------------------------------------------------

    // sums += 16 rows of a tile
    static MEMBER void multiply(float (&sums)[TOKENS / 8][4], Fragments& fragments, uint32 panels, int lane) {
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

    MEMBER void work(int warp) const {
        const int lane = threadIdx.x % WARP, team = warp / TEAM_WARPS, fragment = warp % TEAM_WARPS;
        Place<STAGES> place;
        place.advance(team);
        Fragments fragments;
        fragments.find(weights, fragment, lane);
        cluster_wait();
        grid_wait();
#pragma unroll 1
        for (int pass = 0; pass < part.num_row_tiles; pass++) {
            float sums[TOKENS / 8][4] = {};
#pragma unroll 1
            for (int step = 0; step < part.steps; step++, place.advance(TEAMS)) {
                const int count = part.count(team, step), tile = part.first(team) + step * UNIT_TILES;
                wait_barrier(full + place.slot * 8, place.parity);
#pragma unroll 1
                for (int i = 0; i < count; i++) {
                    fragments.load(place.slot * WEIGHT_BYTES + i * TILE_BYTES, tile_width(tile + i, p.num_columns));
                    multiply(sums, fragments, x + place.slot * X_BYTES + i * (PANELS * PANEL_BYTES), lane);
                }
                __syncwarp();
                if (lane == 0) arrive(empty + place.slot * 8);
            }
            send(sums, pass, fragment, team);
        }
    }

    // ---- adding up: a fragment's parts lie side by side in the block that finishes it, 16 bytes a lane ---------------------

    MEMBER uint32 place_of(int fragment, int eight, int slice) const {
        return results + ((fragment % OWNED * (TOKENS / 8) + eight) * SLICES + slice) * PART_BYTES + threadIdx.x % WARP * 16;
    }

    MEMBER void send(const float (&sums)[TOKENS / 8][4], int pass, int fragment, int team) const {
        if (pass > 0) wait_barrier_in_cluster(taken, (pass - 1) & 1);
        const int owner = fragment / OWNED, eights = num_eights(), slice = blockIdx.x % CLUSTER * TEAMS + team;
        const uint32 to = address_in_cluster(place_of(fragment, 0, slice), owner);
        const uint32 barrier = address_in_cluster(received, owner);
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
            if (n < eights) store_in_cluster(to + n * (SLICES * PART_BYTES), sums[n], barrier);
    }

    // A warp that finishes: one of this block's fragments, 16 rows x all tokens
    MEMBER void finish(int finisher) const {
        static_assert(FINISHERS == OWNED, "one fragment each");
        const int lane = threadIdx.x % WARP, eights = num_eights();
        const int fragment = blockIdx.x % CLUSTER * OWNED + finisher;
        const int token = blockIdx.y * TOKENS + lane % 4 * 2;
        const Runs runs(p.epilogue.num_rows);
        cluster_wait();
        grid_wait();
#pragma unroll 1
        for (int pass = 0; pass < part.num_row_tiles; pass++) {
            if (finisher == 0 && lane == 0) arrive_and_expect(received, OWNED * eights * SLICES * PART_BYTES);
            const int row = (part.first_row_tile + pass) * TILE_ROWS + fragment * 16 + lane / 4;
            bool begins[PAIRS] = {true};  // a run
#pragma unroll
            for (int i = 1; i < PAIRS; i++) {
                const int task = (part.first_row_tile + pass) / GROUP_TILES * PAIRS + i;
                begins[i] = runs.owner(task) != runs.owner(task - 1);
            }
            float before[TOKENS / 8][4];
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n++) load_residual(before[n], p.epilogue, token + n * 8, row);
            wait_barrier_in_cluster(received, pass & 1);
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n++) {
                if (n >= eights) break;
                float parts[SLICES][4], even[4] = {}, odd[4] = {}, sums[4] = {};
#pragma unroll
                for (int j = 0; j < SLICES; j++) load_shared(parts[j], place_of(fragment, n, j));
#pragma unroll
                for (int i = 0; i < PAIRS; i++) {
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        if (begins[i]) sums[k] += even[k] + odd[k], even[k] = odd[k] = 0;
                        even[k] += parts[2 * i][k], odd[k] += parts[2 * i + 1][k];
                    }
                }
#pragma unroll
                for (int k = 0; k < 4; k++) sums[k] += even[k] + odd[k];
                store(p.epilogue, token + n * 8, row, sums, before[n]);
            }
            __syncwarp();
            if (lane < CLUSTER && pass + 1 < part.num_row_tiles) arrive_in_cluster(address_in_cluster(taken, lane));
        }
    }

    MEMBER void run() const {
        const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
        if (warp == 0) init_barriers();
        __syncthreads();
        cluster_arrive();
        if (warp < CONSUMERS) {
            work(warp);
        } else if (warp < CONSUMERS + FINISHERS) {
            finish(warp - CONSUMERS);
        } else {
            if (threadIdx.x % WARP == 0) {
                if (warp == CONSUMERS + FINISHERS)
                    feed_weights();
                else
                    feed_x();
            }
        }
        // A block lives until its last pass is finished, and nobody writes to it after that
    }
};

#define INT4_MMA(TOKENS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) int4_mma_##TOKENS(                                         \
        const __grid_constant__ TensorMap x_map, const uint8* __restrict__ packed, const float* __restrict__ bias,      \
        uint16* out, float* residual, int num_tokens, int num_rows, int num_columns, int gated) {                       \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        const Problem problem = {packed, epilogue, num_columns};                                                        \
        Kernel<TOKENS>(problem, x_map).run();                                                                           \
    }

INT4_MMA(8)
INT4_MMA(16)

#endif
