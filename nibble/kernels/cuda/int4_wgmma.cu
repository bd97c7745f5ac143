// int4_linear for more than 16 tokens on sm_90a: the same op as int4_linear.cu, which says what is computed, with bulk
// copies and warpgroup products (m64nNk16: 64 rows of weights dequantised into registers x N tokens in shared memory).
// int4_hopper.cuh has the order of additions.
//
// Work: a task is 256 rows x two slices of K, in row-major order of tasks. A run of consecutive tasks belongs to one
// worker, all runs equally long (+- 1), and a worker is a cluster of two thread blocks, one for each half of the rows. So
// every multiprocessor streams the same number of bytes whatever the shape; where a run ends in the middle of a row
// group, the sums of the workers that share the group are added up by the last of them to arrive.
//
// Thread block: 16 warps that multiply, two of which a thread each feeds them with weights and with x, and two that are
// there only to leave their registers to the others. A warpgroup owns 64 rows of the block's 128; two teams of two take a
// task's even and its odd slice, and meet in shared memory at the end of a row group or run. Two warpgroups per row tile,
// because one at a time could not hide the latency of its own loads and products.
//
// A ring of stages holds a unit each: two tiles of weights and the tokens' 128 columns. The bytes of x count for as much
// as those of weights: each block of the pair fetches half of the tokens for both. Everything that does not depend on the
// kernel before, i.e. the first stages' weights, is under way before grid_wait().
//
// Grid: (2 * workers, token chunks). Bytes: weights once per chunk, x once per worker and row group.
// H100 80GB HBM3, 64 tokens, group 128, chains of one shape (% of 3.02 TB/s): 28672x4096 52, 4096x14336 46, 6144x4096 26,
// 4096x4096 24. A fifth of the cycles goes to the ends of runs, the others mostly to unpacking.
#include "int4_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int TEAM = 2 * WARPGROUP;  // threads: 128 rows
constexpr int TEAMS = 2;
constexpr int CONSUMERS = TEAMS * TEAM;
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int MANY_REGISTERS = 112, FEW_REGISTERS = 32;  // 512 * 112 + 128 * 32 = 640 * 96
constexpr int BLOCK_TILES = 2;                           // row tiles
constexpr int WEIGHT_BYTES = BLOCK_TILES * TILE_BYTES;
constexpr int SHARED_BYTES = 227 * 1024;  // a block's, at most

struct Problem {
    const uint8* packed;
    Epilogue epilogue;
    float4* partials;  // (chunks, workers, begins in the group's middle or not, 2 blocks, groups, TOKENS / 8, 128 threads)
    uint32* arrivals;  // (chunks, row tiles)
    int num_columns;
};

template <int TOKENS>
struct Kernel {
    static constexpr int PANEL_BYTES = TOKENS * PANEL_COLUMNS * 2;
    static constexpr int X_BYTES = PANELS * PANEL_BYTES;
    static constexpr int SHARE = TOKENS / 8 / TEAMS;  // of a team at the end of a task, in eights
    static constexpr int MEETING_BYTES = TOKENS / 8 * TEAM * 16;
    // int4_wgmma.py has the same formula
    static constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + 2 * 8;
    static constexpr int STAGES = (SHARED_BYTES - MEETING_BYTES - 8) / STAGE_BYTES;
    static constexpr int USED_BYTES = STAGES * STAGE_BYTES + MEETING_BYTES + 8;

    const Problem& p;
    const TensorMap& x_map;
    const Runs runs;
    uint32 x, weights, meeting, full, empty;  // in shared memory
    uint32* is_last;                          // per warpgroup of the first team
    int num_tiles, num_row_tiles, steps, first_task, num_tasks;

    MEMBER Kernel(const Problem& problem, const TensorMap& map)
        : p(problem), x_map(map), runs(problem.epilogue.num_rows) {
        extern __shared__ __align__(1024) uint8 shared[];
        x = shared_address(shared);
        weights = x + STAGES * X_BYTES;
        meeting = weights + STAGES * WEIGHT_BYTES;
        full = meeting + MEETING_BYTES;
        empty = full + STAGES * 8;
        is_last = reinterpret_cast<uint32*>(shared + USED_BYTES - 8);
        num_tiles = (p.num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        num_row_tiles = (p.epilogue.num_rows + TILE_ROWS - 1) / TILE_ROWS;
        steps = (num_tiles + SLICES - 1) / SLICES;  // of the longest slice
        first_task = runs.first(worker());
        num_tasks = runs.first(worker() + 1) - first_task;
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
            init_barrier(full + i * 8, 2);                   // weights and x
            init_barrier(empty + i * 8, 2 * TEAM / WARP);    // of both blocks
        }
        fence_barrier_init();
    }

    // ---- the threads that feed: units in order of tasks, steps and teams -------------------------------------------------

    struct Unit {
        const Kernel& k;
        int task, step = 0, team = 0;
        Place<STAGES> place;

        MEMBER explicit Unit(const Kernel& kernel) : k(kernel), task(kernel.first_task) {}
        MEMBER int num_units() const { return k.num_tasks * k.steps * TEAMS; }
        MEMBER int tile() const { return first_tile(task % PAIRS * TEAMS + team, k.num_tiles) + step; }
        MEMBER bool exists() const { return tile() < first_tile(task % PAIRS * TEAMS + team + 1, k.num_tiles); }
        MEMBER void advance() {
            place.advance();
            if (++team < TEAMS) return;
            team = 0;
            if (++step < k.steps) return;
            step = 0, task++;
        }
    };

    MEMBER void feed_weights() const {
        grid_launch_dependents();
        const int64 row_stride = row_tile_bytes(p.num_columns);
        Unit unit(*this);
        const int num_units = unit.num_units();
#pragma unroll 1
        for (int i = 0; i < num_units; i++, unit.advance()) {
            const uint32 barrier = full + unit.place.slot * 8, target = weights + unit.place.slot * WEIGHT_BYTES;
            if (i >= STAGES) wait_barrier(empty + unit.place.slot * 8, unit.place.parity ^ 1);
            const int tile = unit.tile(), row_tile = unit.task / PAIRS * GROUP_TILES + half() * BLOCK_TILES;
            const int bytes = tile_bytes(tile_width(tile, p.num_columns));
            const int count = unit.exists() ? min(max(num_row_tiles - row_tile, 0), BLOCK_TILES) : 0;
            const uint8* source = p.packed + row_tile * row_stride + int64(tile) * TILE_BYTES;
            arrive_and_expect(barrier, count * bytes);
            if (count > 0) copy_bulk(target, source, bytes, barrier);
            if (count > 1) copy_bulk(target + TILE_BYTES, source + row_stride, bytes, barrier);
        }
    }

    // This block's half of the tokens, for both blocks; the other half comes from the other block
    MEMBER void feed_x() const {
        cluster_wait();
        grid_wait();
        Unit unit(*this);
        const int num_units = unit.num_units(), token = chunk() * TOKENS + half() * (TOKENS / 2);
#pragma unroll 1
        for (int i = 0; i < num_units; i++, unit.advance()) {
            const uint32 barrier = full + unit.place.slot * 8;
            const uint32 target = x + unit.place.slot * X_BYTES + half() * (PANEL_BYTES / 2);
            if (i >= STAGES) wait_barrier(empty + unit.place.slot * 8, unit.place.parity ^ 1);
            if (unit.exists()) {
                arrive_and_expect(barrier, X_BYTES);
#pragma unroll
                for (int h = 0; h < PANELS; h++)
                    copy_box_to_both(target + h * PANEL_BYTES, x_map, unit.tile() * TILE_COLUMNS + h * PANEL_COLUMNS, token,
                                     barrier);
            } else {
                arrive(barrier);
            }
        }
    }

    // ---- the warps that multiply ---------------------------------------------------------------------------------------

    // sums += 64 rows of a tile. Unpacking the second half while the first is multiplied, in registers of its own, gains
    // nothing: another warp's turn
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
        cluster_wait();
        const uint32 my_empty = address_in_cluster(empty, lane & 1);  // lane 0 and 1 arrive at both blocks'
        Place<STAGES> place;
        place.advance(team);
        int left = num_tasks * steps * TEAMS - team;  // units of the block, from this team's next one on
        grid_wait();
        float total[TOKENS / 8][4] = {};
        for (int task = first_task; task < first_task + num_tasks; task++) {
            const int slice = task % PAIRS * TEAMS + team, first = first_tile(slice, num_tiles);
            const int count = first_tile(slice + 1, num_tiles) - first;
            float sums[TOKENS / 8][4] = {};
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                wait_barrier(full + place.slot * 8, place.parity);
                if (step < count) {
                    Fragments fragments;
                    fragments.load(my_weights + place.slot * WEIGHT_BYTES, warp, lane,
                                   tile_width(first + step, p.num_columns));
                    multiply_by_groups(sums, fragments, x + place.slot * X_BYTES);
                }
                __syncwarp();
                // Nobody waits for the last ones, and the other block may be gone
                if (lane < 2 && left > STAGES) arrive_in_cluster(my_empty + place.slot * 8);
                place.advance(TEAMS);
                left -= TEAMS;
            }
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
                for (int k = 0; k < 4; k++) total[j][k] += sums[j][k];
            }
            if (task + 1 < first_task + num_tasks && (task + 1) % PAIRS) continue;
            float mine[SHARE][4];
            meet(mine, total, team);
            finish(mine, task, team);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
        }
    }

    // Adds both teams' sums: a team gets its share of the tokens
    MEMBER void meet(float (&mine)[SHARE][4], const float (&sums)[TOKENS / 8][4], int team) const {
        const uint32 place = meeting + threadIdx.x % TEAM * 16;
        const int barrier = 1 + BLOCK_TILES + threadIdx.x % TEAM / WARP;
#pragma unroll
        for (int j = 0; j < SHARE; j++) {
            if (team)
                store_shared(place + j * (TEAM * 16), sums[j]);
            else
                store_shared(place + (SHARE + j) * (TEAM * 16), sums[SHARE + j]);
        }
        sync_threads<2 * WARP>(barrier);
#pragma unroll
        for (int j = 0; j < SHARE; j++) {
            float other[4];
            load_shared(other, place + (team * SHARE + j) * (TEAM * 16));
#pragma unroll
            for (int k = 0; k < 4; k++) mine[j][k] = (team ? sums[SHARE + j][k] : sums[j][k]) + other[k];
        }
        sync_threads<2 * WARP>(barrier);  // the place is free again
    }

    // A team's sums of a run of tasks that ends with `task`
    MEMBER void finish(float (&sums)[SHARE][4], int task, int team) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
        const int group = threadIdx.x / WARPGROUP % BLOCK_TILES;
        const int row_group = task / PAIRS, row_tile = row_group * GROUP_TILES + half() * BLOCK_TILES + group;
        const int token = chunk() * TOKENS + team * SHARE * 8 + lane % 4 * 2;
        const int row = row_tile * TILE_ROWS + warp * 16 + lane / 4;
        if (row_tile >= num_row_tiles) return;
        float before[SHARE][4];  // asked for ahead of everything else that takes a round trip
#pragma unroll
        for (int j = 0; j < SHARE; j++) load_residual(before[j], p.epilogue, token + j * 8, row);
        const int first = runs.owner(row_group * PAIRS), last = runs.owner(row_group * PAIRS + PAIRS - 1);
        if (first == last || add_partials(sums, row_tile, first, last, p.epilogue.num_tokens - token)) {
#pragma unroll
            for (int j = 0; j < SHARE; j++) store(p.epilogue, token + j * 8, row, sums[j], before[j]);
        }
        __syncwarp();
    }

    MEMBER float4* partials(int owner, bool is_first) const {
        const int block = ((chunk() * (gridDim.x / 2) + owner) * 2 + is_first) * 2 + half();
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
        sync_threads<TEAMS * WARPGROUP>(1 + group);
        if (threadIdx.x / TEAM == 0 && threadIdx.x % WARPGROUP == 0) {
            uint32* arrivals = p.arrivals + chunk() * num_row_tiles + row_tile;
            const bool all = atomicAdd(arrivals, 1) == last - first;
            if (all) *arrivals = 0;
            is_last[group] = all;
        }
        sync_threads<TEAMS * WARPGROUP>(1 + group);
        if (!*reinterpret_cast<volatile uint32*>(is_last + group)) return false;
        fence_device();
        constexpr int BATCH = SHARE < 2 ? SHARE : 2;
#pragma unroll
        for (int start = 0; start < SHARE; start += BATCH) {
            float4 parts[PAIRS][BATCH];  // a group is never shared by more workers than it has tasks
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    parts[i][j] = make_float4(0, 0, 0, 0);  // adds nothing, exactly
                    if (first + i <= last && (start + j) * 8 < num_tokens)
                        parts[i][j] = __ldcg(partials(first + i, i == 0) + (start + j) * WARPGROUP);
                }
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                float4 sum = parts[0][j];
#pragma unroll
                for (int i = 1; i < PAIRS; i++)
                    sum.x += parts[i][j].x, sum.y += parts[i][j].y, sum.z += parts[i][j].z, sum.w += parts[i][j].w;
                sums[start + j][0] = sum.x, sums[start + j][1] = sum.y;
                sums[start + j][2] = sum.z, sums[start + j][3] = sum.w;
            }
        }
        return true;
    }
};

template <int TOKENS>
DEVICE void int4_wgmma(const Problem& p, const TensorMap& x_map) {
    const Kernel<TOKENS> kernel(p, x_map);
    if (threadIdx.x == 0) kernel.init_barriers();
    __syncthreads();
    cluster_arrive();
    // The compiler must see that whole warps take a branch with warpgroup products
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    if (warp < CONSUMERS / WARP) {
        take_registers<MANY_REGISTERS>();
        kernel.work();
    } else {
        leave_registers<FEW_REGISTERS>();
        if (threadIdx.x == CONSUMERS) kernel.feed_weights();
        if (threadIdx.x == CONSUMERS + WARP) kernel.feed_x();
    }
}

#define INT4_WGMMA(TOKENS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) int4_wgmma_##TOKENS(                                       \
        const __grid_constant__ TensorMap x_map, const uint8* __restrict__ packed, const float* __restrict__ bias,      \
        uint16* out, float* residual, float4* partials, uint32* arrivals, int num_tokens, int num_rows,                 \
        int num_columns, int gated) {                                                                                   \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        int4_wgmma<TOKENS>({packed, epilogue, partials, arrivals, num_columns}, x_map);                                 \
    }

// int4_wgmma.py has the same numbers
INT4_WGMMA(32)
INT4_WGMMA(64)

#endif
