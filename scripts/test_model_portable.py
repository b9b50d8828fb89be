#!/usr/bin/env python3
"""model_portable.py's parts, on a few instructions with known answers. Needs nothing but Python:
scripts/test_model_portable.py"""
import unittest
from types import SimpleNamespace
from unittest import mock

import model_portable
import sass
from model_portable import Machine, Step
from test_model_sass import high, listing

# A loop over tiles that skips what is special, and whose fill lies behind its branch back.
LOOP = listing(
    ("MOV R1, R2", high()),
    ("LDSM.16.M88.4 R4, [R2]", high(writes=0)),
    ("@P0 BRA 0x70", high(stall=5)),
    ("@!P1 BRA 0x50", high(stall=5)),
    ("MUFU.EX2 R20, R21", high(writes=1)),
    ("HMMA.16816.F32 R8, R4, R6, R8", high(stall=8, waits=0b1)),
    ("@P2 BRA 0x10", high(stall=5)),
    ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", high()),
    ("LDGDEPBAR", high(writes=0)),
    ("MUFU.EX2 R22, R21", high(writes=1)),
    ("@P3 CALL.REL.NOINC 0xc0", high()),
    ("BRA 0x50", high(stall=5)),
    ("EXIT", high()),
)


def step(**given):
    return Step(**(dict(stall=1, waits=(), writes=None, reads=None) | given))


# A loop over chunks of plain multiply-adds, in which each chunk loads an operand.
PLAIN = listing(
    ("MOV R1, R2", high()),
    ("MOV R3, R2", high()),
    ("LDS.128 R4, [R2]", high(writes=0)),
    ("FFMA R8, R4, R6, R8", high(waits=0b1)),
    ("@P0 BRA 0x20", high(stall=5)),
    ("MUFU.EX2 R20, R21", high(writes=1)),
    ("@P2 BRA 0x10", high(stall=5)),
    ("EXIT", high()),
)


class Walk(unittest.TestCase):
    def setUp(self):
        self.code = sass.functions(LOOP)["kernel"]

    def addresses(self, *work):
        return [i.address for i in model_portable.walk(self.code, work)]

    def test_it_goes_where_the_work_is_and_back_to_the_head(self):
        self.assertEqual(self.addresses(1, 0, 0, 0, 0), [0x10, 0x20, 0x30, 0x50, 0x60])
        self.assertEqual(self.addresses(1, 1, 1, 1, 0), [0x10, 0x20, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0x50, 0x60])
        with self.assertRaises(ValueError):
            self.addresses(2, 0, 0, 0, 0)

    def test_plain_kernels_are_counted_by_their_loads(self):
        self.code = sass.functions(PLAIN)["kernel"]
        self.assertEqual(self.addresses(3, 1, 0, 0, 0), [0x10, *3 * [0x20, 0x30, 0x40], 0x50, 0x60])


class Counts(unittest.TestCase):
    def test_pipes_and_passes(self):
        of = lambda text: sass.Instruction(0, text)
        self.assertEqual(model_portable.pipe_of(of("HMMA.1688.F32.TF32 R8, R4, R6, R8")), ("tensor", 8))
        self.assertEqual(model_portable.pipe_of(of("@!PT LDS RZ, [RZ]"))[0], "")
        passes = [model_portable.wavefronts(of(text)) for text in (
            "LDSM.16.M88.4 R4, [R2]", "LDS.128 R4, [R2]", "LDS R4, [R2]", "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
            "@!PT LDS RZ, [RZ]", "SHFL.BFLY PT, R8, R78, 0x1, 0x1f", "FADD R1, R2, R3")]
        self.assertEqual(passes, [4, 4, 1, 4, 0, 1, 0])
        paired = [model_portable.wavefronts(of(text), True) for text in ("LDS.128 R4, [R2]", "LDS.64 R4, [R2]", "LDS R4, [R2]")]
        self.assertEqual(paired, [2, 2, 1])

    def test_devices_differ_in_their_rates(self):
        of = lambda text: model_portable.pipe_of(sass.Instruction(0, text))
        tf32, half = "HMMA.1688.F32.TF32 R8, R4, R6, R8", "HMMA.16816.F32 R8, R4, R6, R8"
        ffma, imad = "FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4"
        for name, cycles in {"a100": (8, 8, 2, 2), "geforce": (32, 32, 1, 2), "professional": (16, 16, 1, 2)}.items():
            with mock.patch.object(model_portable, "device", model_portable.DEVICES[name]):
                self.assertEqual(tuple(of(text)[1] for text in (tf32, half, ffma, imad)), cycles, name)

    def test_x_is_resident_where_it_fits(self):
        kernel = SimpleNamespace(output_chunks=0, stage_chunks=1, chunks=8, BLOCK_X=128, BLOCK_Y=64, CHUNK=128)
        self.assertTrue(model_portable.is_resident(kernel))
        with mock.patch.object(model_portable, "device", model_portable.DEVICES["geforce"]):
            self.assertFalse(model_portable.is_resident(kernel))
            self.assertEqual(model_portable.shared_bytes(kernel), 17408 + 2 * 16384)


class Simulation(unittest.TestCase):
    def period(self, steps, blocks=1, warps=1):
        model_portable.value["jitter"] = 0
        return Machine(steps, blocks, warps, 0, False).period()

    def test_stalls_scoreboards_and_pipes(self):
        self.assertEqual(self.period([step(stall=4), step(stall=2)]), 6)
        self.assertEqual(self.period([step(writes=0, latency=30), step(waits=(0,))]), 32)
        self.assertEqual(self.period([step(pipe="tensor", cycles=8)] * 4, warps=2), 64)

    def test_warps_hide_each_other_s_latency_unless_a_barrier_holds_them(self):
        work = [step(writes=0, latency=62), step(waits=(0,)), *[step(pipe="fma", cycles=2, stall=2)] * 16]
        alone, together = self.period(work), self.period(work, warps=2)
        self.assertLess(together, 1.2 * alone)
        barrier = step(barrier=True, latency=20)
        self.assertGreater(self.period([barrier, *work], warps=2), together)
        self.assertLess(self.period([barrier, *work], blocks=2), self.period([barrier, *work], warps=2) + 1)

    def test_copies_are_there_when_their_group_is_waited_for(self):
        copy, commit = step(copies=True, wavefronts=16, latency=300), step(commits=True, writes=0)
        self.assertGreater(self.period([copy, commit, step(groups=0)]), 300)
        self.assertLess(self.period([copy, commit, step(groups=1)]), 300)


if __name__ == "__main__":
    unittest.main()
