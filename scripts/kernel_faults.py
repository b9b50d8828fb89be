"""The faults of scripts/mutate_kernels.py: what is dropped, moved or miscounted, and which tests must see it."""

from dataclasses import dataclass


@dataclass
class Fault:
    """In `file`, `old` becomes `new`: one anchor each, or tuples of several. An anchor is there once, or is the first
    one behind `after`, which is there once."""

    name: str
    file: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    tests: str
    capability: int = 90
    after: str = ""
    # "2": by the letter, where shuffles and votes order nothing.
    races: str = "1"
    # Why it is no fault, where something else orders what it leaves unordered: it need not be found.
    harmless: str = ""


def wide_output(what, old, new, tests="small::wide", **more):
    return Fault(f"wide_output: {what}", "wide_output_sm90a.cu", old, new, tests, **more)


def wide_scores(what, old, new, **more):
    return Fault(f"wide_scores: {what}", "wide_scores.cuh", old, new, "small::wide", **more)


def output(what, old, new, tests="small::narrow", **more):
    return Fault(f"output: {what}", "output_sm90a.cu", old, new, tests, **more)


def statistics(what, old, new, **more):
    return Fault(f"statistics: {what}", "statistics_sm90a.cu", old, new, "small::narrow", **more)


def pipeline(what, old, new, **more):
    return Fault(f"pipeline: {what}", "pipeline.cuh", old, new, "small::narrow", **more)


def portable(what, file, old, new, tests="small::portable", **more):
    return Fault(f"portable: {what}", file, old, new, tests, capability=80, **more)


def topk(what, file, old, new, **more):
    return Fault(f"topk: {what}", file, old, new, "small::searches", capability=80, **more)


def table(what, file, old, new, **more):
    return Fault(f"table: {what}", file, old, new, "small::tables", capability=80, **more)


CLUSTER_SYNC = "    ptx::cluster_sync();\n"
BLOCK_SYNC = "    __syncthreads();\n"

FAULTS = [
    # Hopper, narrow rows: the ring between producer and consumers.
    pipeline(
        "handed back without __syncwarp",
        "        __syncwarp();\n        ptx::barrier_arrive(ptx",
        "        ptx::barrier_arrive(ptx",
        races="2",
    ),
    pipeline(
        "empty barriers expect one arrival fewer", "&empty[i]), CONSUMER_WARPS)", "&empty[i]), CONSUMER_WARPS - 1)"
    ),
    pipeline(
        "full barriers waited for with the wrong parity",
        "&full[place.index]), place.parity);",
        "&full[place.index]), place.parity ^ 1);",
    ),
    pipeline(
        "empty barriers waited for with the wrong parity",
        "&empty[place.index]), place.parity ^ 1);",
        "&empty[place.index]), place.parity);",
    ),
    pipeline("the parity never turns", "            parity ^= 1;\n", ""),
    pipeline("producer does not wait for empty terms", "                shared.of_terms.wait_empty(place);\n", ""),
    pipeline("producer does not wait for empty chunks", "            shared.chunks.wait_empty(place);\n", ""),
    pipeline("producer does not wait for an empty X", "            shared.of_x.wait_empty(x_place);\n", ""),
    pipeline(
        "last terms without __syncwarp",
        "to[i] = i < present ? from[i] : nothing;\n    __syncwarp();\n",
        "to[i] = i < present ? from[i] : nothing;\n",
    ),
    pipeline(
        "flag written after the arrival that hands it over",
        "                    shared.flags[place.index] = flags;\n"
        "                    copy_bulk_terms(shared.of_terms, place, to, terms + first, present);\n",
        "                    copy_bulk_terms(shared.of_terms, place, to, terms + first, present);\n"
        "                    shared.flags[place.index] = flags;\n",
    ),
    pipeline(
        "fewer bytes expected than copied",
        "shared.chunks.expect(place, BLOCK_Y * CHUNK_BYTES)",
        "shared.chunks.expect(place, BLOCK_Y * CHUNK_BYTES / 2)",
    ),
    statistics("no __syncthreads after the barriers' initialisation", BLOCK_SYNC, ""),
    statistics(
        "chunks handed back before the matmul's wait",
        "            finish(b);\n            release_chunks();\n",
        "            release_chunks();\n            finish(b);\n",
    ),
    statistics("terms not waited for", "        shared.of_terms.wait_full(terms_place);\n", ""),
    statistics(
        "terms handed back before they are read",
        "            reduce(b, tile, second);\n            release_terms();\n",
        "            release_terms();\n            reduce(b, tile, second);\n",
    ),
    statistics("X not waited for", "        shared.of_x.wait_full(x_place);\n", ""),
    # Not of synchronisation: what a maximum that stays where it is has to notice.
    Fault(
        "statistics: a maximum never moves again",
        "score.cuh",
        "return sum[0] > LARGEST | sum[1] > LARGEST | state",
        "return state",
        "narrow_kernels_agree_where_maxima_move",
    ),
    output(
        "chunks handed back before the matmul's wait",
        "            wgmma::wait<0>();\n            wgmma::settle(o);\n            release_chunks();\n",
        "            release_chunks();\n            wgmma::wait<0>();\n            wgmma::settle(o);\n",
    ),
    output(
        "X handed back before the scores' wait",
        (
            "        start_scores(s);\n        wait_terms();\n        wgmma::wait<0>();\n",
            "        shared.of_x.release(x_place);\n        x_place.advance();\n",
        ),
        (
            "        start_scores(s);\n        shared.of_x.release(x_place);\n"
            "        wait_terms();\n        wgmma::wait<0>();\n",
            "        x_place.advance();\n",
        ),
    ),
    output(
        "last chunks handed back before the matmul's wait",
        "        wgmma::wait<0>();\n        wgmma::settle(o);\n        release_chunks();\n        write(",
        "        release_chunks();\n        wgmma::wait<0>();\n        wgmma::settle(o);\n        write(",
        harmless="the producer fills them again after the next unit's first terms came back, and these come back after that wait",
    ),
    output(
        "spoiled rows cleared without fence.proxy.async",
        "        ptx::fence_async_shared();\n",
        "",
        tests="small::spoiled",
    ),
    output(
        "spoiled rows cleared without the first barrier",
        "    __device__ __forceinline__ void clear_spoiled() {\n"
        "        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);\n",
        "    __device__ __forceinline__ void clear_spoiled() {\n",
        tests="small::spoiled",
    ),
    output(
        "spoiled rows cleared without the last barrier",
        "        ptx::fence_async_shared();\n        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);\n",
        "        ptx::fence_async_shared();\n",
        tests="small::spoiled",
    ),
    # Hopper, wide rows: pairs of blocks.
    wide_scores(
        "X handed back before wait<1>",
        "            wgmma::wait<1>();\n            if (chunk == LAG) continue;\n            release_x();\n",
        "            if (chunk != LAG) release_x();\n            wgmma::wait<1>();\n"
        "            if (chunk == LAG) continue;\n",
    ),
    wide_scores(
        "b's X handed back before wait<0>",
        "        wgmma::wait<0>();\n        wgmma::settle(b);\n        release_x();\n",
        "        release_x();\n        wgmma::wait<0>();\n        wgmma::settle(b);\n",
    ),
    wide_scores("no cluster barrier at the start", CLUSTER_SYNC, "", after="after it has gone.\n"),
    wide_scores(
        "no cluster barrier at the end",
        "Shape, Epilogue>(h, shared).run();\n    }\n" + CLUSTER_SYNC,
        "Shape, Epilogue>(h, shared).run();\n    }\n",
    ),
    wide_scores("producer does not wait for an empty X", "        shared.of_x.wait_empty(x_place);\n", ""),
    wide_output(
        "stage handed back before wait<1>",
        "            wgmma::wait<1>();\n            release(used);\n            used.advance();\n",
        "            release(used);\n            used.advance();\n            wgmma::wait<1>();\n",
    ),
    wide_output(
        "last stage handed back before wait<0>",
        "        wgmma::wait<0>();\n        wgmma::settle(o);\n        if (!empty) release(used);\n",
        "        if (!empty) release(used);\n        wgmma::wait<0>();\n        wgmma::settle(o);\n",
    ),
    wide_output(
        "__syncthreads in place of the first cluster barrier", CLUSTER_SYNC, BLOCK_SYNC, after="after it has gone.\n"
    ),
    wide_output(
        "no cluster barrier at the end",
        "Consumer<Element>(h, shared).run();\n    }\n" + CLUSTER_SYNC,
        "Consumer<Element>(h, shared).run();\n    }\n",
    ),
    wide_output(
        "stage read before it is full",
        "        shared.ring.wait_full(place);\n        const char* slab",
        "        const char* slab",
    ),
    wide_output(
        "spoiled rows cleared without fence.proxy.async",
        "        ptx::fence_async_shared();\n",
        "",
        tests="small::spoiled",
    ),
    wide_output(
        "spoiled rows cleared without their barrier",
        "        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);\n",
        "",
        tests="small::spoiled",
    ),
    Fault("wide: handed back without __syncwarp", "wide.cuh", "        __syncwarp();\n", "", "small::wide"),
    Fault(
        "wide: handed back to the own block only",
        "wide.cuh",
        "lane % PAIR, lane < PAIR)",
        "ptx::cluster_rank(), lane < PAIR)",
        "small::wide",
    ),
    Fault(
        "wide: empty barriers expect the own block only",
        "wide.cuh",
        "PAIR * CONSUMER_WARPS)",
        "CONSUMER_WARPS)",
        "small::wide",
    ),
    # Portable kernels.
    portable(
        "ring without __syncthreads",
        "tile_stream.cuh",
        "        wait_for_copies();\n        __syncthreads();\n",
        "        wait_for_copies();\n",
    ),
    portable(
        "ring waits for one group of copies too few",
        "tile_stream.cuh",
        "cp_async_wait<STAGES - 2>",
        "cp_async_wait<STAGES - 1>",
    ),
    portable(
        "stage refilled while it is read",
        "tile_stream.cuh",
        "            if (place == 0 && first == 0) fill(before(stage));\n",
        "            if (place == 0 && first == 0) fill(stage);\n",
    ),
    portable(
        "spoiled rows cleared without a barrier",
        "tile_stream.cuh",
        '                         : "memory");\n        }\n        __syncthreads();\n',
        '                         : "memory");\n        }\n',
        tests="small::spoiled",
    ),
    portable(
        "stage refilled with the second half of its tile's rows",
        "tile_stream.cuh",
        "            if (place == 0 && first == 0) fill(before(stage));\n",
        "            if (place == 0 && first != 0) fill(before(stage));\n",
    ),
    portable(
        "maxima written without a __syncwarp after their reads",
        "slab_stream.cuh",
        "            __syncwarp();\n#pragma unroll",
        "#pragma unroll",
        races="2",
    ),
    portable(
        "maxima read without a __syncwarp after their writes",
        "slab_stream.cuh",
        "            }\n            __syncwarp();\n",
        "            }\n",
        races="2",
    ),
    portable(
        "maxima of outputs never move again",
        "score.cuh",
        "return below(largest[0], headroom) > state.max[0] + SLACK | below(largest[1], headroom) > state.max[1] + SLACK;",
        "return state.max[0] == -INFINITY | state.max[1] == -INFINITY;",
        tests="narrow_kernels_agree_where_maxima_move",
    ),
    portable(
        "maxima of statistics never move again",
        "score.cuh",
        "return sum[0] > LARGEST | sum[1] > LARGEST | state",
        "return state",
        tests="narrow_kernels_agree_where_maxima_move",
    ),
    portable(
        "statistics of low scores without a maximum",
        "score.cuh",
        " | state.max[0] == -INFINITY | state.max[1] == -INFINITY;",
        ";",
        tests="kernels_agree_where_all_scores_are_low",
    ),
    portable(
        "one set of terms instead of two",
        "tile_stream.cuh",
        "return shared->terms[tile % STAGES];",
        "return shared->terms[0];",
    ),
    portable(
        "sum of a block without its first barrier",
        "block_sum.cuh",
        "    __syncthreads();  // the last sum has been read\n",
        "",
        tests="small::losses",
    ),
    portable(
        "sum of a block without its last barrier",
        "block_sum.cuh",
        "of_warps[threadIdx.x / WARP] = value;\n    __syncthreads();\n",
        "of_warps[threadIdx.x / WARP] = value;\n",
        tests="small::losses",
    ),
    portable(
        "rows' numbers read without a barrier",
        "finish_rows.cu",
        "    __syncthreads();\n    for (uint32_t local",
        "    for (uint32_t local",
        tests="small::losses",
    ),
    portable(
        "rows' shares of d_gamma read without a barrier",
        "finish_rows.cu",
        "    __syncthreads();\n    if (warp != 0) return;\n",
        "    if (warp != 0) return;\n",
        tests="small::losses",
    ),
    portable(
        "rows of a key by plain writes",
        "key_table.cuh",
        "atomicOr(reinterpret_cast<unsigned long long*>(&table.rows[place].rows), 1ull << row % ROWS_OF_KEY);",
        "table.rows[place].rows |= 1ull << row % ROWS_OF_KEY;",
        tests="small::portable",
    ),
    topk("keys compacted without __syncwarp", "best.cuh", "            __syncwarp();\n", "", races="2"),
    topk("shrink without __syncwarp", "best.cuh", "        __syncwarp();\n#pragma unroll", "#pragma unroll"),
    topk("sort without __syncthreads in its loop", "topk.cu", "            __syncthreads();\n", ""),
    topk(
        "sort without __syncthreads at its end",
        "topk.cu",
        "        }\n    }\n    __syncthreads();\n}",
        "        }\n    }\n}",
    ),
    # Tables: negatives of rows' own, the sort of uses, gradients by row.
    table(
        "maximum of a block without its barrier",
        "own_negatives.cu",
        "of_warps[threadIdx.x / WARP] = value;\n    __syncthreads();\n",
        "of_warps[threadIdx.x / WARP] = value;\n",
    ),
    table(
        "own negatives' numbers read without a barrier",
        "own_negatives.cu",
        "    __syncthreads();\n    write_sums(",
        "    write_sums(",
    ),
    table(
        "own negatives' probabilities read without a barrier",
        "own_negatives.cu",
        "    __syncthreads();  // probabilities are there\n",
        "",
        harmless="sums over the block come between, and they have barriers",
    ),
    table(
        "warps' shares of an output read without a barrier",
        "own_negatives.cu",
        "element)] = sum;\n        }\n        __syncthreads();\n",
        "element)] = sum;\n        }\n",
    ),
    table(
        "warps' shares of an output replaced without a barrier",
        "own_negatives.cu",
        "+ threadIdx.x] = sum;\n        }\n        __syncthreads();\n",
        "+ threadIdx.x] = sum;\n        }\n",
    ),
    table(
        "coefficients of wide rows read without __syncwarp",
        "finish_table.cu",
        "const Lanes& lanes) {\n    __syncwarp();\n",
        "const Lanes& lanes) {\n",
        races="2",
    ),
    table(
        "counts of digits added to before they are 0",
        "sort_uses.cu",
        "    counts[threadIdx.x] = 0;\n    __syncthreads();\n",
        "    counts[threadIdx.x] = 0;\n",
    ),
    table(
        "counts of digits read without a barrier",
        "sort_uses.cu",
        "    __syncthreads();\n    p.places[uint64_t(blockIdx.x)",
        "    p.places[uint64_t(blockIdx.x)",
    ),
    table(
        "sums of warps read without a barrier",
        "sort_uses.cu",
        "of_warps[warp] = sum;\n    __syncthreads();\n",
        "of_warps[warp] = sum;\n",
    ),
    table(
        "scatter: counts added to before they are 0",
        "sort_uses.cu",
        "places[of][threadIdx.x] = 0;\n    __syncthreads();\n",
        "places[of][threadIdx.x] = 0;\n",
    ),
    table(
        "scatter: counts replaced before they are read",
        "sort_uses.cu",
        "        __syncwarp();  // counts are read before they are replaced\n",
        "",
    ),
    table(
        "scatter: counts read before they are replaced",
        "sort_uses.cu",
        "places[warp][digit] += __popc(same);\n        __syncwarp();\n",
        "places[warp][digit] += __popc(same);\n",
    ),
    table(
        "scatter: warps' counts read without a barrier",
        "sort_uses.cu",
        "    __syncthreads();\n\n    // Thread t has digit t.\n",
        "\n    // Thread t has digit t.\n",
    ),
    table(
        "scatter: places read without a barrier",
        "sort_uses.cu",
        "        place += count;\n    }\n    __syncthreads();\n",
        "        place += count;\n    }\n",
    ),
    table(
        "scatter: sorted entries read without a barrier",
        "sort_uses.cu",
        "+ before[round]] = entries[round];\n    }\n    __syncthreads();\n",
        "+ before[round]] = entries[round];\n    }\n",
    ),
    table(
        "sum of a block without its barrier",
        "sort_uses.cu",
        "of_warps[threadIdx.x / WARP] = value;\n    __syncthreads();\n",
        "of_warps[threadIdx.x / WARP] = value;\n",
    ),
    table(
        "warps' counts of first uses read without a barrier",
        "sort_uses.cu",
        "of_warps[warp] = __popc(firsts);\n        __syncthreads();\n",
        "of_warps[warp] = __popc(firsts);\n",
    ),
    table(
        "warps' counts of first uses replaced before they are read",
        "sort_uses.cu",
        "        __syncthreads();  // counts are read before they are replaced\n",
        "",
    ),
    table(
        "positives: two rows write results of one pair",
        "positives.cu",
        "    p.pair_offsets[row] = ascending_offset(p, row);\n",
        "    p.pair_offsets[row] = max(int64_t(0), min(from, int64_t(p.pairs)));\n",
    ),
]
