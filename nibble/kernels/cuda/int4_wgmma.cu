// int4_linear for more than 16 tokens on sm_90a: the same op as int4_linear.cu, which says what is computed, with bulk
// copies and warpgroup products (m64nNk16: 64 rows of weights dequantised into registers x N tokens in shared memory).
// int4_hopper.cuh has the order of additions.
//
// Work: a task is 256 rows x two slices of K, in row-major order of tasks. A run of consecutive tasks belongs to one
// worker, all runs equally long (+- 1), and a worker is a cluster of two thread blocks, one for each half of the rows. So
// every multiprocessor streams the same number of bytes whatever the shape. Workers that share a row group leave each other
// their sums in device memory; those whose run ends there share out the tokens to add up.
//
// Thread block: 16 warps that multiply, two of which a thread each feeds them with weights and with x, and two that are
// there only to leave their registers to the others. A warpgroup owns 64 rows of the block's 128; two teams of two take a
// task's even and its odd slice, and meet in shared memory at the end of a row group or run. Two warpgroups per row tile,
// because one at a time could not hide the latency of its own loads and products. Control flow inside of the loop over tasks
// depends on the block alone, and trip counts on nothing: otherwise the compiler takes warps for divergent and computes
// places in the ring and descriptors per lane, 15 of 190 instructions a unit.
//
// A ring of stages holds a unit each: two tiles of weights and the tokens' 128 columns. The bytes of x count for as much
// as those of weights: each block of the pair fetches half of the tokens for both. Everything that does not depend on the
// kernel before, i.e. the first stages' weights, is under way before grid_wait().
//
// Grid: (2 * workers, token chunks). Bytes: weights once per chunk, x once per worker and row group.
// H100 80GB HBM3, 64 tokens, group 128, chains of one shape (% of 3.02 TB/s): 28672x4096 54, 4096x14336 53, 6144x4096 33,
// 4096x4096 32. The rest is unpacking next to products, which slow each other, and 4 to 5 us from a kernel's last product to
// the next one's first.
#include "exchange.cuh"
#include "int4_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int TEAM = 2 * WARPGROUP;  // threads: 128 rows
constexpr int TEAMS = 2;
constexpr int CONSUMERS = TEAMS * TEAM;
constexpr int WARPS = CONSUMERS / WARP;
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int MANY_REGISTERS = 112, FEW_REGISTERS = 32;  // 512 * 112 + 128 * 32 = 640 * 96
constexpr int BLOCK_TILES = 2;                           // row tiles
constexpr int BLOCK_ROWS = BLOCK_TILES * TILE_ROWS;
constexpr int WEIGHT_BYTES = BLOCK_TILES * TILE_BYTES;
constexpr int TURNED_BYTES = (BLOCK_ROWS + 4) * 4;  // of a token's sums, so that a fragment's words lie in different banks
constexpr int SHARED_BYTES = 227 * 1024;            // a block's, at most

struct Problem {
    const uint8* packed;
    Epilogue epilogue;
    float4* exchange;  // (chunks, workers, first of a row group or not, 2 blocks, TOKENS, 32 lanes), see exchange.cuh
    int num_columns;
};

template <int TOKENS>
struct Kernel {
    static constexpr int PANEL_BYTES = TOKENS * PANEL_COLUMNS * 2;
    static constexpr int X_BYTES = PANELS * PANEL_BYTES;
    static constexpr int WARP_TOKENS = TOKENS / WARPS;  // of a warp that finishes
    static constexpr int MEETING_BYTES = TEAMS * TOKENS * TURNED_BYTES;
    // int4_wgmma.py has the same formula
    static constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES + 2 * 8;
    static constexpr int STAGES = (SHARED_BYTES - MEETING_BYTES) / STAGE_BYTES / TEAMS * TEAMS;  // see Place

    const Problem& p;
    const TensorMap& x_map;
    const Runs runs;
    uint32 x, weights, meeting, full, empty;  // in shared memory
    int num_tiles, num_row_tiles, steps, first_task, num_tasks;

    MEMBER Kernel(const Problem& problem, const TensorMap& map)
        : p(problem), x_map(map), runs(problem.epilogue.num_rows) {
        extern __shared__ __align__(1024) uint8 shared[];
        x = shared_address(shared);
        weights = x + STAGES * X_BYTES;
        meeting = weights + STAGES * WEIGHT_BYTES;
        full = meeting + MEETING_BYTES;
        empty = full + STAGES * 8;
        num_tiles = (p.num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
        num_row_tiles = (p.epilogue.num_rows + TILE_ROWS - 1) / TILE_ROWS;
        steps = (num_tiles + SLICES - 1) / SLICES;  // of the longest slice
        first_task = runs.first(worker());
        num_tasks = runs.first(worker() + 1) - first_task;
    }

    static MEMBER int worker() { return blockIdx.x / 2; }
    static MEMBER int half() { return blockIdx.x % 2; }
    static MEMBER int chunk() { return blockIdx.y; }

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
    // nothing: another warp's turn. b: panel_place() of the tokens' columns
    MEMBER void multiply_by_groups(float (&sums)[TOKENS / 8][4], Fragments& fragments, uint32 b) const {
        float(&flat)[TOKENS / 2] = reinterpret_cast<float(&)[TOKENS / 2]>(sums);
#pragma unroll
        for (int h = 0; h < PANELS; h++) {
            uint32 a[STEPS][4];
#pragma unroll
            for (int step = 0; step < STEPS; step++) fragments.get(a[step], h, step);
            pin(a);
            fence_products();
#pragma unroll
            for (int step = 0; step < STEPS; step++) multiply(flat, a[step], panel_descriptor(b + (h * PANEL_BYTES + step * 32 >> 4)));
            commit_products();
            wait_products<0>();
            pin(flat);
        }
    }

    MEMBER void work() const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, group = threadIdx.x / WARPGROUP % BLOCK_TILES;
        const int team = __shfl_sync(FULL_WARP, threadIdx.x / TEAM, 0);
        Fragments fragments;
        fragments.find(weights + group * TILE_BYTES, warp, lane);
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
                    fragments.load(place.slot * WEIGHT_BYTES, tile_width(first + step, p.num_columns));
                    multiply_by_groups(sums, fragments, panel_place(x) + place.slot * (X_BYTES >> 4));
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
            if (task + 1 == first_task + num_tasks || (task + 1) % PAIRS) continue;
            meet(total, team);
            pass_on(task / PAIRS);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j++) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0;
        }
        meet(total, team);
        finish(first_task + num_tasks - 1);
    }

    // ---- the end of a row group or of the run ------------------------------------------------------------------------------

    // Both teams' sums to shared memory, turned: tokens x rows. So that whole rows are read and written from here on: the
    // words of a fragment, 8 rows at a time, took as long as all else at a run's end.
    MEMBER void meet(const float (&total)[TOKENS / 8][4], int team) const {
        const int lane = threadIdx.x % WARP;
        const uint32 fragment = meeting + (team * TOKENS + lane % 4 * 2) * TURNED_BYTES +
                                (threadIdx.x % TEAM / WARP * 16 + lane / 4) * 4;
        sync_threads<CONSUMERS>(1);  // all have read what was here before
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) store_shared(fragment + (j * 8 + k % 2) * TURNED_BYTES + k / 2 * 32, total[j][k]);
        }
        sync_threads<CONSUMERS>(1);
    }

    // Four consecutive rows of a token, both teams' sums added
    MEMBER void met(float (&sums)[4], int token) const {
        const uint32 row = meeting + token * TURNED_BYTES + threadIdx.x % WARP * 16;
        float odd[4];
        load_shared(sums, row);
        load_shared(odd, row + TOKENS * TURNED_BYTES);
#pragma unroll
        for (int k = 0; k < 4; k++) sums[k] += odd[k];
    }

    // Of this lane
    MEMBER int first_row(int row_group) const {
        return (row_group * GROUP_TILES + half() * BLOCK_TILES) * TILE_ROWS + threadIdx.x % WARP * 4;
    }
    MEMBER int num_tokens() const { return min(TOKENS, p.epilogue.num_tokens - chunk() * TOKENS); }

    // Rows behind which the run goes on: all their tasks were this worker's, or another adds up
    MEMBER void pass_on(int row_group) const {
        const int row = first_row(row_group), first = runs.owner(row_group * PAIRS);
        if (row - threadIdx.x % WARP * 4 >= p.epilogue.num_rows) return;
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            const int token = threadIdx.x / WARP + i * WARPS;
            float sums[4];
            met(sums, token);
            if (first != worker()) {
                if (token < num_tokens()) leave(place(worker(), false) + token * WARP, sums);
            } else {
                float before[4];
                load_rows(before, p.epilogue, chunk() * TOKENS + token, row);
                store_rows(p.epilogue, chunk() * TOKENS + token, row, sums, before);
            }
        }
    }

    // The rows where a run ends
    MEMBER void finish(int task) const {
        const int row_group = task / PAIRS, row = first_row(row_group), warp = threadIdx.x / WARP;
        if (row - threadIdx.x % WARP * 4 >= p.epilogue.num_rows) return;
        const int first = runs.owner(row_group * PAIRS), last = runs.owner(row_group * PAIRS + PAIRS - 1);
        const int adders = num_adders(row_group), token = chunk() * TOKENS + warp;
        if (first != last) give(first, adders);
        constexpr int BATCH = WARP_TOKENS < 2 ? WARP_TOKENS : 2;  // in as many registers as there are
#pragma unroll 1
        for (int start = 0; start < WARP_TOKENS; start += BATCH) {
            if (worker() < first + adder(start, adders) || worker() > first + adder(start + BATCH - 1, adders)) continue;
            bool adds[BATCH];
            float before[BATCH][4], sums[BATCH][4];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                adds[j] = first + adder(start + j, adders) == worker() && (start + j) * WARPS + warp < num_tokens();
                load_rows(before[j], p.epilogue, adds[j] ? token + (start + j) * WARPS : p.epilogue.num_tokens, row);
                met(sums[j], warp + (start + j) * WARPS);
            }
            if (first != last) add<BATCH>(sums, adds, start, first, last);
#pragma unroll
            for (int j = 0; j < BATCH; j++)
                if (adds[j]) store_rows(p.epilogue, token + (start + j) * WARPS, row, sums[j], before[j]);
        }
    }

    // ---- adding up what the workers that share rows have -------------------------------------------------------------------
    // A worker waits for three others at most, its neighbours in the grid, and none waits before it has left what it has.

    // A worker's sums of rows that it shares, as the first to have some of them or not; + token * WARP
    MEMBER float4* place(int owner, bool is_first) const {
        const int block = ((chunk() * (gridDim.x / 2) + owner) * 2 + is_first) * 2 + half();
        return p.exchange + int64(block) * (TOKENS * WARP) + threadIdx.x % WARP;
    }

    // Those whose run ends in a group of rows share out the adding; one that goes on has been here long ago
    MEMBER int num_adders(int row_group) const {
        const int first = runs.owner(row_group * PAIRS), last = runs.owner(row_group * PAIRS + PAIRS - 1);
        return max(last - first + (runs.first(last + 1) <= (row_group + 1) * PAIRS), 1);
    }

    // Which of the workers from `first` on adds up a warp's i-th token
    static MEMBER int adder(int i, int adders) { return i * adders / WARP_TOKENS; }

    // What others add up
    MEMBER void give(int first, int adders) const {
        const int warp = threadIdx.x / WARP;
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            if (first + adder(i, adders) == worker()) continue;
            float sums[4];
            met(sums, warp + i * WARPS);
            if (warp + i * WARPS < num_tokens()) leave(place(worker(), worker() == first) + (warp + i * WARPS) * WARP, sums);
        }
    }

    // sums: of the tokens from `start` on, of which those that this worker adds get what the others have
    template <int BATCH>
    MEMBER void add(float (&sums)[BATCH][4], const bool (&adds)[BATCH], int start, int first, int last) const {
        float parts[PAIRS][BATCH][4];  // rows are never shared by more workers than they have tasks
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
#pragma unroll
                for (int k = 0; k < 4; k++) parts[i][j][k] = first + i == worker() ? sums[j][k] : 0;  // adds nothing, exactly
            }
        }
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    if (adds[j] && first + i <= last && first + i != worker())
                        look(parts[i][j], place(first + i, i == 0) + (threadIdx.x / WARP + (start + j) * WARPS) * WARP);
            }
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
#pragma unroll
                for (int j = 0; j < BATCH; j++) all &= is_there(parts[i][j]);
            }
        } while (!__all_sync(FULL_WARP, all));
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                sums[j][k] = parts[0][j][k];
#pragma unroll
                for (int i = 1; i < PAIRS; i++) sums[j][k] += parts[i][j][k];
            }
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                if (adds[j] && first + i <= last && first + i != worker())
                    clear(place(first + i, i == 0) + (threadIdx.x / WARP + (start + j) * WARPS) * WARP);
        }
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
        uint16* out, float* residual, float4* exchange, int num_tokens, int num_rows, int num_columns, int gated) {     \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        int4_wgmma<TOKENS>({packed, epilogue, exchange, num_columns}, x_map);                                           \
    }

// int4_wgmma.py has the same numbers
INT4_WGMMA(32)
INT4_WGMMA(64)

#endif
