#!/usr/bin/env python3
"""model_sass.py's parts, on a few instructions with known answers. Needs nothing but Python:
scripts/test_model_sass.py"""
import unittest
from collections import Counter

import model_sass
import sass
from sass_pipeline import Scheduler, Step


def high(stall=1, writes=7, reads=7, waits=0):
    """The upper half of an instruction's code; 7 is no scoreboard."""
    return (stall | writes << 5 | reads << 8 | waits << 11) << 41


def listing(*lines):
    """As cuobjdump prints it: (text, control code)."""
    text = ["\t\tFunction : kernel"]
    for at, (instruction, code) in enumerate(lines):
        text.append(f"        /*{16 * at:04x}*/                   {instruction} ;  /* 0x0000000000000000 */")
        text.append(f"                                            /* 0x{code:016x} */")
    return "\n".join(text)


# A loop that skips what is special, two loads that the multiplications wait for, and an exponential.
LOOP = listing(
    ("LDS.64 R4, [R2]", high(writes=0)),
    ("LDS.128 R8, [R2+0x10]", high(stall=2, writes=1)),
    ("HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0", high()),
    ("@!P0 BRA 0x50", high(stall=5)),
    ("MUFU.EX2 R20, R21", high(writes=2)),
    ("FMUL R6, R4, R5", high(waits=0b1)),
    ("FMUL R7, R8, R6", high(stall=4, waits=0b10)),
    ("MUFU.EX2 R22, R7", high(writes=2, reads=3)),
    ("@P1 BRA 0x0", high(stall=5)),
)


class Listing(unittest.TestCase):
    def setUp(self):
        self.code = sass.functions(LOOP)["kernel"]

    def test_control_codes(self):
        # Of stream_hopper_bounded_1_f16: LDS.128 R152 counts on scoreboard 4; the FMUL behind it waits for 0.
        real = sass.decode(0, "LDS.128 R152, [R176+0x28140]", 0x000FE20000000C00 & ~(7 << 46) | 4 << 46)
        self.assertEqual((real.stall, real.writes, real.reads, real.waits), (1, 4, None, ()))
        self.assertEqual([i.stall for i in self.code], [1, 2, 1, 5, 1, 1, 4, 1, 5])
        self.assertEqual([i.writes for i in self.code], [0, 1, None, None, 2, None, None, 2, None])
        self.assertEqual((self.code[6].waits, self.code[7].reads), ((1,), 3))

    def test_an_unguarded_result_is_found(self):
        self.assertEqual(sass.check_waits(self.code), [])
        wrong = listing(("LDS R4, [R2]", high(writes=0)), ("FMUL R6, R4, R5", high(waits=0b10)))
        wrong = sass.functions(wrong)["kernel"]
        self.assertEqual([register for _, register in sass.check_waits(wrong)], ["R4"])

    def test_the_walk_skips_what_the_work_does_not_need(self):
        loop = sass.main_loop(self.code, 1)
        walk = sass.plain_walk(loop, Counter(EX2=1, HGMMA=1))
        self.assertEqual([i.address for i in walk], [0, 16, 32, 48, 80, 96, 112, 128])
        self.assertEqual(len(sass.plain_walk(loop, Counter(EX2=2, HGMMA=1))), 9)
        with self.assertRaises(ValueError):
            sass.plain_walk(loop, Counter(LDG=1))

    def test_an_inner_loop_is_walked_as_often_as_the_work_needs(self):
        code = sass.functions(listing(
            ("MUFU.EX2 R1, R2", high()),
            ("HGMMA.64x8x16.F32 R24, gdesc[UR4], R24, gsb0", high()),
            ("@P0 BRA 0x10", high()),
            ("@P1 BRA 0x0", high()),
        ))["kernel"]
        self.assertEqual(len(sass.plain_walk(code, Counter(EX2=1, HGMMA=3))), 1 + 3 * 2 + 1)


class Counts(unittest.TestCase):
    def test_cycles_of_a_multiprocessor(self):
        code = sass.functions(LOOP)["kernel"]
        # 64x128x16: 64 cycles at 4096 flops; operands of 2 and 4 KiB. Loads: 4 schedulers, 2 and 4 passes at most.
        low, high_ = model_sass.counts(code, 1280, 1), model_sass.counts(code, 1280, None)
        self.assertEqual((low["issue"], low["mufu"], low["fma"], low["tensor"]), (18, 32, 4, 128))
        self.assertEqual((low["shared"], high_["shared"]), (2 * (48 + 4 * 2) + 10, 2 * (48 + 4 * 6) + 10))

    def test_an_operand_in_registers_costs_shared_memory_nothing(self):
        of = lambda text: model_sass.matmul(sass.Instruction(0, text))
        self.assertEqual(of("HGMMA.64x64x16.F32 R88, gdesc[UR4], R88"), (32, 32))
        self.assertEqual(of("HGMMA.64x64x16.F32 R88, R120, gdesc[UR16].tnspB, R88"), (32, 16))


class Pipeline(unittest.TestCase):
    def period(self, steps, warps=1, **options):
        return Scheduler([steps] * warps, [0] * warps, **options).period(20, 10)

    def test_stalls_and_scoreboards(self):
        self.assertEqual(self.period([Step(stall=4), Step(stall=2)]), 6)
        self.assertEqual(self.period([Step(writes=0, latency=30), Step(waits=(0,))]), 31)
        self.assertEqual(self.period([Step(writes=0, latency=30), Step(waits=(1,))]), 2)

    def test_two_warps_share_a_pipe_and_hide_each_other_s_latency(self):
        self.assertEqual(self.period([Step(pipe="mufu", cycles=8)] * 4, warps=2), 64)
        self.assertEqual(self.period([Step(writes=0, latency=30), Step(waits=(0,))], warps=2), 31)

    def test_matmuls_run_beside_what_does_not_wait_for_them(self):
        matmul = Step(matmul=(64, 48), commits=True)
        work = [Step(pipe="mufu", cycles=8)] * 10
        wait = Step(groups=0)
        self.assertEqual(self.period([matmul, wait] + work), 64 + 1 + 9 * 8 + 1)
        self.assertEqual(self.period([matmul] + work + [wait]), 80)
        # The group before the last one: one runs while the other's result is used.
        self.assertEqual(self.period([matmul, Step(groups=1)]), 64)
        self.assertEqual(self.period([matmul, wait], drain=30), 64 + 30 + 1)

    def test_shared_memory_binds_where_operands_or_loads_need_more_than_the_matmul_takes(self):
        self.assertEqual(self.period([Step(matmul=(32, 80), commits=True), Step(groups=1)]), 80)
        loads = [Step(wavefronts=16)] * 4
        self.assertEqual(self.period([Step(matmul=(64, 64), commits=True)] + loads + [Step(groups=1)]), 128)
        self.assertEqual(self.period([Step(matmul=(64, 48), commits=True), Step(groups=1)], background=0.5), 96)

    def test_a_barrier_lets_warpgroups_take_turns(self):
        turn = [Step(barrier="sync")] + [Step(pipe="mufu", cycles=8)] * 4 + [Step(barrier="arrive")]
        self.assertGreaterEqual(self.period(turn, warps=2), 2 * 32)
        with self.assertRaises(RuntimeError):
            self.period([Step(barrier="sync")])


if __name__ == "__main__":
    unittest.main()
