#!/usr/bin/env python3
"""model_sass.py's model on FlashAttention-3's machine code, whose speed on an H100 is published: is it plausible at
all?

    pip download --no-deps xformers==0.0.32.post2 && unzip xformers-*.whl 'xformers/flash_attn_3/_C.so'
    cuobjdump -arch sm_90a -xelf all xformers/flash_attn_3/_C.so
    scripts/model_attention.py _C.39.sm_90a.cubin _C.123.sm_90a.cubin _C.85.sm_90a.cubin

Each cubin holds the forward kernels of one head dimension in 16 bits (f16: 128, 64, 256). The one without masks is
taken. Its loop is that of a tile of keys: scores of the next tile, the output of this one, and a softmax.

Published: Shah et al., "FlashAttention-3" (arXiv 2407.08608), figure 5, forward without causal mask, 16384 keys, read
from a transcription of the figure. The measurements include what the model leaves out, as the start and end of each
block of queries. The model's clock is that of model_sass.py.
"""
import re
import sys
from collections import Counter

import model_sass
import sass

# TFLOP/s by head dimension.
PUBLISHED = {64: 497, 128: 648, 256: 756}


def kernel(image):
    """The plain forward kernel's name and main loop, with threads of its consumers."""
    # Template arguments: element, sums, architecture; causal, local, softcap, variable lengths.
    plain = re.compile(r"CollectiveMainloopFwdSm90.*?arch4Sm90E(Lb0E){4}")
    forward = {name: code for name, code in sass.functions(sass.listing(image)).items() if plain.search(name)}
    found = {name: next(loop for loop in sass.loops(code) if sass.exponentials(loop)) for name, code in forward.items()}
    for name, code in forward.items():
        assert not sass.check_waits(code), f"{image}: control codes are not what sass.py takes them for"
    return min(found.items(), key=lambda item: len(item[1]))


def shape(matmul):
    return int(re.search(r"HGMMA\.64x(\d+)x16", matmul.text)[1])


HEAD = (f"{'D':>4} {'queries':>7} {'keys':>4} {'mufu':>6} {'tensor':>6} {'shared memory':>13} {'model: cycles':>20}"
        f" {'model: TFLOP/s':>17} {'published':>9}")


def main():
    print(HEAD)
    for image in sys.argv[1:]:
        name, loop = kernel(image)
        walk = sass.plain_walk(loop, Counter(EX2=sass.exponentials(loop), HGMMA=sass.count(loop, "HGMMA")))
        # Values are read transposed, and only they.
        matmuls = [i for i in walk if i.opcode == "HGMMA"]
        keys, dim = (next(shape(i) for i in matmuls if ("tnspB" in i.text) == is_output) for is_output in (False, True))
        groups = 3 if dim == 64 else 2
        copied = 2 * 2 * keys * dim
        low, high = (model_sass.counts(walk, copied, passes, groups) for passes in model_sass.value["passes"])
        ends = model_sass.model(walk, copied, groups)
        flops = groups * sass.flops(walk)
        rates = [flops * model_sass.SMS * model_sass.clock(low["tensor"] / cycles) / cycles / 1e12 for cycles in ends]
        cells = [f"{cycles:6.0f}" for cycles in (low["mufu"], low["tensor"], low["shared"], high["shared"], *ends)]
        cells += [f"{rate:5.0f}" for rate in rates]
        print(f"{dim:4} {64 * groups:7} {keys:4} {' '.join(cells)} {PUBLISHED[dim]:9}", flush=True)


if __name__ == "__main__":
    main()
