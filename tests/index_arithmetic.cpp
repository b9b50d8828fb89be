// Checks kernels/shared/layout.h against the PTX manual's layouts, and kernels/shared/hash.h. `index_arithmetic CHECK` exits with 1
// and says what is wrong.
#include "../kernels/shared/hash.h"
#include "../kernels/shared/layout.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {

void require(bool condition, const std::string& what) {
    if (condition) return;
    std::printf("%s\n", what.c_str());
    std::exit(1);
}

std::string at(const char* what, uint32_t a, uint32_t b = 0, uint32_t c = 0) {
    return std::string(what) + " " + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c);
}

// A chunk of 16-bit elements: what is at (row, column) is its name, row * 64 + column.
struct Chunk {
    std::vector<uint16_t> elements;

    explicit Chunk(uint32_t rows) : elements(rows * CHUNK_BYTES / 2, 0xffff) {
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t column = 0; column < 64; ++column) {
                elements[(swizzle(row, column / 8) + column % 8 * 2) / 2] = static_cast<uint16_t>(row * 64 + column);
            }
        }
    }

    // ldmatrix.x4 of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8. Of each matrix lane l gets row l / 4,
    // columns 2 (l % 4) and the next; transposed, column l / 4, rows 2 (l % 4) and the next.
    std::array<std::array<uint16_t, 2>, 4> load(uint32_t lane, const std::function<uint32_t(uint32_t)>& address, bool transposed) const {
        std::array<std::array<uint16_t, 2>, 4> out{};
        for (uint32_t matrix = 0; matrix < 4; ++matrix) {
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
                out[matrix][i] = elements[address(matrix * 8 + row) / 2 + column];
            }
        }
        return out;
    }
};

void swizzle_is_a_bijection() {
    for (uint32_t rows : {64u, 128u}) {
        std::set<uint32_t> seen;
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t unit = 0; unit < UNITS; ++unit) {
                const uint32_t offset = swizzle(row, unit);
                require(offset % UNIT_BYTES == 0 && offset < rows * CHUNK_BYTES, at("outside the chunk:", row, unit));
                require(seen.insert(offset).second, at("twice the same place:", row, unit));
            }
        }
    }
}

// The 32 banks of 4 bytes are eight groups of 16 bytes; a phase of eight lanes wants one each.
void no_load_has_bank_conflicts() {
    const std::map<std::string, std::function<uint32_t(uint32_t, uint32_t)>> loads = {
        {"a", [](uint32_t lane, uint32_t k) { return swizzle(a_row(lane), 2 * (k % 4) + a_unit(lane)); }},
        {"b", [](uint32_t lane, uint32_t k) { return swizzle(16 * (k / 4) + b_row(lane), 2 * (k % 4) + b_unit(lane)); }},
        {"transposed", [](uint32_t lane, uint32_t k) { return swizzle(16 * (k / 4) + a_row(lane), 2 * (k % 4) + a_unit(lane)); }},
        {"copy", [](uint32_t lane, uint32_t k) { return swizzle(copy_row(32 * k + lane), copy_unit(32 * k + lane)); }},
    };
    for (const auto& [name, address] : loads) {
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t phase = 0; phase < 4; ++phase) {
                std::set<uint32_t> banks;
                for (uint32_t lane = 8 * phase; lane < 8 * phase + 8; ++lane) banks.insert(address(lane, k) % 128 / 16);
                require(banks.size() == 8, at((name + " conflicts:").c_str(), k, phase));
            }
        }
    }
}

// f32's operand of O += P Y comes 4 bytes a lane, from all 32 banks.
void single_precision_loads_have_no_bank_conflicts() {
    for (uint32_t step = 0; step < 8; ++step) {
        for (uint32_t tile = 0; tile < 4; ++tile) {
            for (uint32_t next = 0; next < 2; ++next) {
                std::set<uint32_t> banks;
                for (uint32_t lane = 0; lane < 32; ++lane) {
                    const uint32_t address = swizzle(single_row(lane, step) + next, single_unit(lane, tile)) + single_byte(lane);
                    banks.insert(address / 4 % 32);
                }
                require(banks.size() == 32, at("conflicts:", step, tile, next));
            }
        }
    }
}

// mma.m16n8k16, A: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8).
void operand_a_is_what_mma_wants() {
    const Chunk x(128);
    for (uint32_t warp_row = 0; warp_row < 128; warp_row += 16) {
        for (uint32_t step = 0; step < STEPS_PER_CHUNK; ++step) {
            for (uint32_t lane = 0; lane < 32; ++lane) {
                const auto a = x.load(lane, [&](uint32_t l) { return swizzle(warp_row + a_row(l), 2 * step + a_unit(l)); }, false);
                for (uint32_t r = 0; r < 4; ++r) {
                    const uint32_t row = warp_row + lane / 4 + r % 2 * 8, column = 16 * step + lane % 4 * 2 + r / 2 * 8;
                    require(a[r][0] == row * 64 + column && a[r][1] == row * 64 + column + 1, at("a:", step, lane, r));
                }
            }
        }
    }
}

// B: b0 (k = 2t, n = g), b1 (k = 2t + 8, n = g). Columns n of B are rows of the streamed chunk.
void operand_b_is_what_mma_wants() {
    const Chunk y(64);
    for (uint32_t step = 0; step < STEPS_PER_CHUNK; ++step) {
        for (uint32_t pair = 0; pair < 4; ++pair) {
            for (uint32_t lane = 0; lane < 32; ++lane) {
                const auto b = y.load(lane, [&](uint32_t l) { return swizzle(16 * pair + b_row(l), 2 * step + b_unit(l)); }, false);
                for (uint32_t r = 0; r < 4; ++r) {
                    const uint32_t row = 16 * pair + r / 2 * 8 + lane / 4, column = 16 * step + r % 2 * 8 + lane % 4 * 2;
                    require(b[r][0] == row * 64 + column && b[r][1] == row * 64 + column + 1, at("b:", step, pair, lane));
                }
            }
        }
    }
}

// A sum over a chunk that leaves out columns is wrong, however right its operands are.
void steps_cover_every_unit_once() {
    std::set<uint32_t> a, b;
    for (uint32_t step = 0; step < STEPS_PER_CHUNK; ++step) {
        for (uint32_t unit = 0; unit < 2; ++unit) {
            require(a.insert(2 * step + a_unit(16 * unit)).second, at("a: twice the same unit:", step, unit));
            require(b.insert(2 * step + b_unit(8 * unit)).second, at("b: twice the same unit:", step, unit));
        }
    }
    require(a.size() == UNITS && *a.rbegin() == UNITS - 1, "a: not all units of a chunk");
    require(b.size() == UNITS && *b.rbegin() == UNITS - 1, "b: not all units of a chunk");
}

// mma.m16n8k8 of 32-bit elements, A: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); B: b0 (k = t, n = g),
// b1 (k = t + 4, n = g). To ldmatrix an element of 32 bits is two of 16, and all of it goes to one lane.
void single_precision_operands_are_what_mma_wants() {
    const Chunk chunk(128);
    const auto whole = [](const std::array<uint16_t, 2>& halves, uint32_t row, uint32_t column) {
        return halves[0] == row * 64 + 2 * column && halves[1] == row * 64 + 2 * column + 1;
    };
    for (uint32_t step = 0; step < STEPS_PER_CHUNK; ++step) {
        for (uint32_t pair = 0; pair < 4; ++pair) {
            for (uint32_t lane = 0; lane < 32; ++lane) {
                const uint32_t g = lane / 4, t = lane % 4;
                const auto a = chunk.load(lane, [&](uint32_t l) { return swizzle(16 * pair + a_row(l), 2 * step + a_unit(l)); }, false);
                const auto b = chunk.load(lane, [&](uint32_t l) { return swizzle(16 * pair + b_row(l), 2 * step + b_unit(l)); }, false);
                for (uint32_t r = 0; r < 4; ++r) {
                    require(whole(a[r], 16 * pair + g + r % 2 * 8, 8 * step + t + r / 2 * 4), at("a:", step, lane, r));
                    require(whole(b[r], 16 * pair + g + r / 2 * 8, 8 * step + t + r % 2 * 4), at("b:", step, lane, r));
                }
            }
        }
    }
}

// In O += P Y the streamed rows are k and its columns n.
void transposed_operand_is_what_mma_wants() {
    const Chunk y(64);
    for (uint32_t step = 0; step < 4; ++step) {
        for (uint32_t pair = 0; pair < 4; ++pair) {
            for (uint32_t lane = 0; lane < 32; ++lane) {
                const auto b = y.load(lane, [&](uint32_t l) { return swizzle(16 * step + a_row(l), 2 * pair + a_unit(l)); }, true);
                for (uint32_t r = 0; r < 4; ++r) {
                    const uint32_t k = 16 * step + r % 2 * 8 + lane % 4 * 2, n = 16 * pair + r / 2 * 8 + lane / 4;
                    require(b[r][0] == k * 64 + n && b[r][1] == (k + 1) * 64 + n, at("transposed:", step, pair, lane));
                }
            }
        }
    }
}

// P stays in registers: accumulator tiles 2s and 2s + 1 are the operand A of step s.
void accumulators_are_the_next_operand() {
    for (uint32_t step = 0; step < 4; ++step) {
        for (uint32_t lane = 0; lane < 32; ++lane) {
            for (uint32_t r = 0; r < 4; ++r) {
                for (uint32_t i = 0; i < 2; ++i) {
                    const uint32_t row = lane / 4 + r % 2 * 8, k = 16 * step + r / 2 * 8 + lane % 4 * 2 + i;
                    const uint32_t half = r % 2, n = 2 * step + r / 2, e = 2 * half + i;
                    require(c_row(lane, half) == row && c_column(lane, n, e) == k, at("p:", step, lane, r));
                }
            }
        }
    }
}

// f32: whatever k is called, both operands must mean the same streamed row, and n the same column.
void single_precision_permutes_both_sides_alike() {
    for (uint32_t step = 0; step < 8; ++step) {
        std::set<uint32_t> rows;
        for (uint32_t lane = 0; lane < 32; ++lane) {
            for (uint32_t i = 0; i < 2; ++i) {
                // A's column t + 4 i is the accumulator's element i of tile `step`; B's row t + 4 i is single_row + i.
                require(c_column(lane, step, i) == single_row(lane, step) + i, at("k:", step, lane, i));
                rows.insert(single_row(lane, step) + i);
            }
            for (uint32_t tile = 0; tile < 4; ++tile) {
                const uint32_t byte = single_unit(lane, tile) * UNIT_BYTES + single_byte(lane);
                require(byte == (8 * tile + lane / 4) * 4, at("n:", tile, lane));
            }
        }
        require(rows.size() == 8 && *rows.begin() == 8 * step && *rows.rbegin() == 8 * step + 7, at("rows of step", step));
    }
}

// Plain multiply-adds: 16 bytes of X are the same for lanes l and l ^ 1, those of Y for l and l ^ 2, and what lanes read at a time lies in
// different banks. (Rows of an accumulator's tiles are 8 apart: one tile stands for all.)
void plain_loads_are_shared_by_neighbours() {
    for (uint32_t unit = 0; unit < UNITS; ++unit) {
        std::set<uint32_t> x, y[2], output[8];
        for (uint32_t lane = 0; lane < 32; ++lane) {
            require(partner(partner(lane)) == lane, at("partner:", lane));
            require(c_row(partner(lane), 0) == c_row(partner(lane ^ 1), 0), at("rows:", lane));
            x.insert((swizzle(c_row(partner(lane), 0), 0) ^ unit * UNIT_BYTES) % CHUNK_BYTES);
            for (uint32_t e = 0; e < 2; ++e) {
                const uint32_t column = c_column(partner(lane), 0, e);
                require(column == c_column(partner(lane ^ 2), 0, e), at("columns:", lane, e));
                require((swizzle(column, 0) ^ unit * UNIT_BYTES) == swizzle(column, unit), at("unit:", lane, e, unit));
                y[e].insert(swizzle(column, unit) % CHUNK_BYTES);
            }
            for (uint32_t row = 0; row < 8; ++row) {
                require(plain_unit(lane, 0) == plain_unit(lane ^ 2, 0), at("output columns:", lane));
                const uint32_t second = row * CHUNK_BYTES + (plain_unit(lane, 0) * UNIT_BYTES ^ (row ^ 4) * UNIT_BYTES);
                require(second == swizzle(row, plain_unit(lane, 4)), at("second unit:", lane, row));
                output[row].insert(swizzle(row, plain_unit(lane, 0)));
            }
        }
        require(x.size() == 8 && y[0].size() == 4 && y[1].size() == 4, at("bank conflicts in unit", unit));
        for (const auto& units : output) require(units.size() == 4, "bank conflicts of an output");
    }
}

void plain_outputs_settle_where_an_accumulator_has_them() {
    std::set<std::array<uint32_t, 3>> seen;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        for (uint32_t i = 0; i < 8; ++i) {
            for (uint32_t half = 0; half < 2; ++half) seen.insert({c_row(partner(lane), half), plain_column(lane, i), half});
            const uint32_t n = i / 2, e = i % 2, owner = plain_owner(lane, n), place = plain_place(n, e) + lane % 2 * 2;
            require(c_row(partner(owner), 0) == c_row(lane, 0), at("row:", lane, n, e));
            require(plain_column(owner, place) == c_column(lane, n, e), at("column:", lane, n, e));
        }
    }
    require(seen.size() == 16 * 32, "not all of a slab's output");
}

void copies_cover_a_chunk_once() {
    constexpr uint32_t THREADS = 256;
    for (uint32_t rows : {64u, 128u}) {
        std::set<uint32_t> seen;
        for (uint32_t i = 0; i < rows * UNITS / THREADS; ++i) {
            for (uint32_t thread = 0; thread < THREADS; ++thread) {
                const uint32_t place = thread + i * THREADS, row = copy_row(place), unit = copy_unit(place);
                require(row < rows && unit < UNITS && seen.insert(row * UNITS + unit).second, at("copy:", rows, i, thread));
            }
        }
        require(seen.size() == rows * UNITS, at("not all of a chunk of rows", rows));
    }
}

// The producer of the panel's products copies eight neighbouring slabs of a chunk at once.
void panels_hold_each_fragment_once() {
    constexpr uint32_t CHUNKS = 3, SLABS = 16;
    std::set<uint64_t> seen;
    for (uint32_t chunk = 0; chunk < CHUNKS; ++chunk) {
        for (uint32_t slab = 0; slab < SLABS; ++slab) {
            const uint64_t start = panel_slab(chunk, slab, SLABS);
            require(slab == 0 || start == panel_slab(chunk, slab - 1, SLABS) + SLAB_BYTES, at("not neighbours:", chunk, slab));
            for (uint32_t step = 0; step < PANEL_STEPS; ++step) {
                for (uint32_t lane = 0; lane < 32; ++lane) {
                    const uint32_t within = slab_fragment(step, lane);
                    require(within + UNIT_BYTES <= SLAB_BYTES && within % UNIT_BYTES == 0, at("outside the slab:", step, lane));
                    require(seen.insert(start + within).second, at("twice the same place:", slab, step, lane));
                }
            }
        }
    }
    require(*seen.rbegin() + UNIT_BYTES == uint64_t(CHUNKS) * SLABS * SLAB_ROWS * PANEL_CHUNK_ROWS * 2, "2 bytes for each pair");
}

// The first output of SplitMix64 from seed 0, which src/hash.rs is checked against, too.
void ids_are_hashed_as_on_the_host() {
    require(mix(0x9e3779b97f4a7c15ull) == 0xe220a8397b1dcdafull, "not the published finaliser");
}

// Slots that are looked at while `keys` go into a table that they fill half, as key_table.cuh does it.
uint64_t probes(const std::vector<uint64_t>& keys) {
    const uint32_t capacity = 2 * keys.size();
    std::vector<bool> taken(capacity);
    uint64_t count = 0;
    for (uint64_t key : keys) {
        uint32_t slot = first_slot(key, capacity);
        for (++count; taken[slot]; ++count) slot = (slot + 1) & (capacity - 1);
        taken[slot] = true;
    }
    return count;
}

// Linear probing looks at 1.5 slots for each of random keys (Knuth, vol. 3, 6.4), give or take 0.03 with 2^13 of them.
void keys_of_every_structure_find_a_slot_at_once() {
    constexpr uint64_t KEYS = 1 << 13;
    const std::map<std::string, std::function<uint64_t(uint64_t, uint32_t)>> kinds = {
        {"i << ", [](uint64_t i, uint32_t shift) { return i << shift; }},
        {"shard << 48 | n << ", [](uint64_t i, uint32_t shift) { return i % 64 << 48 | i / 64 << shift; }},
        {"i << 48 | i << ", [](uint64_t i, uint32_t shift) { return i << 48 | i << shift; }},
    };
    for (const auto& [name, key] : kinds) {
        for (uint32_t shift = 0; shift <= 34; ++shift) {
            std::vector<uint64_t> keys;
            for (uint64_t i = 0; i < KEYS; ++i) keys.push_back(key(i, shift));
            const uint64_t count = probes(keys);
            const std::string what = name + std::to_string(shift) + ": probes";
            require(count < KEYS * 17 / 10, at(what.c_str(), static_cast<uint32_t>(count)));
        }
    }
    std::vector<uint64_t> high;
    for (uint64_t i = 0; i < KEYS; ++i) high.push_back(i << 51);
    require(probes(high) < KEYS * 17 / 10, "ids in the highest bits alone");
}

}  // namespace

int main(int argc, char** argv) {
    const std::map<std::string, void (*)()> checks = {
        {"swizzle_is_a_bijection", swizzle_is_a_bijection},
        {"no_load_has_bank_conflicts", no_load_has_bank_conflicts},
        {"single_precision_loads_have_no_bank_conflicts", single_precision_loads_have_no_bank_conflicts},
        {"steps_cover_every_unit_once", steps_cover_every_unit_once},
        {"single_precision_operands_are_what_mma_wants", single_precision_operands_are_what_mma_wants},
        {"operand_a_is_what_mma_wants", operand_a_is_what_mma_wants},
        {"operand_b_is_what_mma_wants", operand_b_is_what_mma_wants},
        {"transposed_operand_is_what_mma_wants", transposed_operand_is_what_mma_wants},
        {"accumulators_are_the_next_operand", accumulators_are_the_next_operand},
        {"single_precision_permutes_both_sides_alike", single_precision_permutes_both_sides_alike},
        {"plain_loads_are_shared_by_neighbours", plain_loads_are_shared_by_neighbours},
        {"plain_outputs_settle_where_an_accumulator_has_them", plain_outputs_settle_where_an_accumulator_has_them},
        {"copies_cover_a_chunk_once", copies_cover_a_chunk_once},
        {"panels_hold_each_fragment_once", panels_hold_each_fragment_once},
        {"ids_are_hashed_as_on_the_host", ids_are_hashed_as_on_the_host},
        {"keys_of_every_structure_find_a_slot_at_once", keys_of_every_structure_find_a_slot_at_once},
    };
    if (argc == 1) {
        for (const auto& check : checks) std::printf("%s\n", check.first.c_str());
        return 0;
    }
    const auto check = checks.find(argv[1]);
    require(argc == 2 && check != checks.end(), "no such check");
    check->second();
}
