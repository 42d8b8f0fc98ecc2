"""Tables of a GPU's figures: what was predicted, in prose, beside what was measured."""

from __future__ import annotations

from bench.cells import Line, Rows, Table, line

RUN = "3d6c0d6"


def kernel(op: str, **where: str | float) -> Rows:
    """Rows of one op on the first GPU run, of our arm unless said."""
    return Rows(f"gpu_{op}.csv", RUN)(arm="ours", **where)


decode = kernel("decode", memories=1)
prefill = kernel("prefill", memories=1, dtype="bfloat16")
update = kernel("masked_update")
merge = kernel("ties_merge")
model = kernel("model_decode")
norms = kernel("norms", case="Llama-2-7B, neuron, 512 rows, *")
leverage = kernel("leverage")
route = kernel("route", rows=512)
sketched = kernel("sketched")

neuron, element = decode(case="Llama-2-7B, neuron, *, in scope"), decode(case="Llama-2-7B, element, *, in scope")
neuron_out, element_out = (decode(case=f"Llama-2-7B, {layout}, *, out of scope") for layout in ("neuron", "element"))
neuron_prefill, element_prefill = (prefill(case=f"Llama-2-7B, {layout}, *") for layout in ("neuron", "element"))
PROJECTION = dict(arm="projection")


def alone(rows: Rows) -> dict[str, Rows]:
    """The projection alone in a decode step of one row, and what a memory in scope adds."""
    return dict(plain=rows(rows=1, **PROJECTION), added=rows(rows=1).less(**PROJECTION))


def scored(text: str, rows: Rows) -> Line:
    """A line of an op that scores prompts: `text` is its cells up to the bound."""
    return line(text + " {ours.us:.0f} | {plain.us:.0f} |", ours=rows, plain=rows(arm="plain"))


GPU = {
    "gpu-targets": Table(
        "| case | prediction | target | measured |",
        line(
            "| decode, out of scope | a launch that returns at once, 1.5 us: 1.07x; element, two: 1.14x | 1.03x "
            "| neuron {one.ratio:.2f}x, 8 rows {eight.ratio:.2f}x; element {element.ratio:.2f}x |",
            one=neuron_out(rows=1),
            eight=neuron_out(rows=8),
            element=element_out(rows=1),
        ),
        line(
            "| decode, in scope, neuron | 18 MB more, 4.3 us, and a launch: 1.27x | 1.30x "
            "| {one.ratio:.2f}x, 8 rows {eight.ratio:.2f}x |",
            one=neuron(rows=1),
            eight=neuron(rows=8),
        ),
        line(
            "| decode, in scope, element | 26 MB would be 6 us, but expanding 45 M weights takes 23 us of issue slots, "
            "and two launches: 2.2x | 1.30x | {one.ratio:.2f}x, 8 rows {eight.ratio:.2f}x |",
            one=element(rows=1),
            eight=element(rows=8),
        ),
        line(
            "| prefill, neuron, 2048 rows | 0.2x the operations, 53 us; compaction 13 us, routing and add 15 us: 1.31x "
            "| 1.25x | {long.ratio:.2f}x; 512 rows {short.ratio:.2f}x |",
            long=neuron_prefill(rows=2048),
            short=neuron_prefill(rows=512),
        ),
        line(
            "| prefill, element, 2048 rows | as many operations again, 1.8x if the expansion is hidden, 2.4x if it is "
            "not | 2.1x | {long.ratio:.2f}x; 512 rows {short.ratio:.2f}x |",
            long=element_prefill(rows=2048),
            short=element_prefill(rows=512),
        ),
        line(
            "| sketched norms as they were (gathered columns), 64 memories, 64 wide "
            "| 64 x 0.2 x 64 / 4096 = 0.2x the operations, in tf32: 1.4x "
            "| 1.10x | {long.ratio:.1f}x at 2048 rows, {short.ratio:.1f}x at 512 |",
            long=sketched(rows=2048),
            short=sketched(rows=512),
        ),
        line(
            "| masked_update, Adam, 512 tokens | 231 MB, 55 us; the dense chain moves 4.4 GB, 1.1 ms: 20x | 20x "
            "| {neuron.us:.0f} us, {neuron.speedup:.1f}x; element {element.us:.0f} us, {element.speedup:.1f}x |",
            neuron=update(case="Llama-2-7B, neuron, 512 tokens, adam"),
            element=update(case="Llama-2-7B, element, 512 tokens, adam"),
        ),
        line(
            "| masked_update, SGD, 512 tokens | 87 MB, 21 us; the dense chain 1.7 GB, 0.47 ms: 22x | 20x "
            "| {neuron.us:.0f} us, {neuron.speedup:.1f}x; element {element.us:.0f} us, {element.speedup:.1f}x |",
            neuron=update(case="Llama-2-7B, neuron, 512 tokens, sgd"),
            element=update(case="Llama-2-7B, element, 512 tokens, sgd"),
        ),
        line(
            "| ties_merge, neuron, 2 shards | 0.43 GB in 6 passes, 0.1 ms, two syncs; the chain 3 ms: 15x | 20x "
            "| {two.us:.0f} us, {two.speedup:.0f}x; 4 shards {four.us:.0f} us, {four.speedup:.0f}x; "
            "element {element.us:.0f} us, {element.speedup:.1f}x |",
            two=merge(case="Llama-2-7B, neuron, 2 shards"),
            four=merge(case="Llama-2-7B, neuron, 4 shards"),
            element=merge(case="Llama-2-7B, element, 2 shards"),
        ),
        line(
            "| whole-model decode, out of scope | 13 GB, 3.1 ms; one launch: 1.0005x | 1.005x "
            "| {least.ratio:.3f}x to {most.ratio:.3f}x, batches of 1 and 8 |",
            least=model(arm="out of scope").least("ratio"),
            most=model(arm="out of scope").greatest("ratio"),
        ),
        line(
            "| whole-model decode, in scope | 18 MB and a launch, 6 us: 1.002x | "
            "| {least.ratio:.3f}x to {most.ratio:.3f}x |",
            least=model(arm="in scope").least("ratio"),
            most=model(arm="in scope").greatest("ratio"),
        ),
    ),
    "gpu-projections": Table(
        "| projection | plain, decode (bf16) | plain, 2048 rows | one neuron memory more, decode | 2048 rows "
        "| 64 memories, decode | measured |",
        line(
            "| Llama-2-7B, 4096 x 11008 | 90 MB, 21 us | 185 GFLOP, 234 us | 18 MB, 4.2 us | 36.9 GFLOP, 47 us "
            "| 1.15 GB, 268 us | decode {plain.us:.0f} us, memory +{added.us:.1f}; 2048 rows {long.us:.0f} us, "
            "memory +{more.us:.0f}; 64 memories out of scope +{many.us:.1f} |",
            **alone(neuron),
            long=neuron_prefill(rows=2048, **PROJECTION),
            more=neuron_prefill(rows=2048).less(**PROJECTION),
            many=neuron_out(memories=64).less(**PROJECTION),
        ),
        line(
            "| Llama-3-8B, Mistral-7B, 4096 x 14336 | 117 MB, 27 us | 241 GFLOP, 304 us | 23.5 MB, 5.5 us "
            "| 48.1 GFLOP, 61 us | 1.50 GB, 350 us | decode {plain.us:.0f} us, memory +{added.us:.0f} |",
            **alone(decode(case="Llama-3-8B, neuron, *")),
        ),
        line(
            "| GPT-J, 4096 x 16384 | 134 MB, 31 us | 275 GFLOP, 348 us | 26.8 MB, 6.2 us | 55.0 GFLOP, 70 us "
            "| 1.72 GB, 400 us | decode {plain.us:.0f} us, memory +{added.us:.0f} |",
            **alone(decode(case="GPT-J, neuron, *")),
        ),
        line(
            "| Gemma-3-270M, 640 x 2048 | 2.6 MB, 0.6 us | 5.4 GFLOP, 6.8 us | 0.5 MB, 0.1 us | 1.1 GFLOP, 1.4 us "
            "| 34 MB, 7.8 us | decode {plain.us:.0f} us (launches), memory +{added.us:.1f} |",
            **alone(decode(case="Gemma-3-270M, neuron, *")),
        ),
    ),
    "gpu-masked-update": Table(
        "| projection | optimiser | bytes | 64 tokens | 512 tokens | 2048 tokens | dense chain, bytes alone "
        "| measured |",
        line(
            "| Llama-2-7B | Adam | 235 MB | 55 / 55 us | 55 / 70 us | 55 / 281 us | 4.4 GB, 1.0 ms "
            "| {few.us:.0f} / {more.us:.0f} / {most.us:.0f} us at {few.rows:.0f} / {more.rows:.0f} / {most.rows:.0f} "
            "tokens, bf16, with the gather of features |",
            few=update(case="Llama-2-7B, neuron, 64 tokens, adam"),
            more=update(case="Llama-2-7B, neuron, 512 tokens, adam"),
            most=update(case="Llama-2-7B, neuron, 2048 tokens, adam"),
        ),
        line(
            "| Llama-2-7B | SGD | 90 MB | 21 / 21 us | 21 / 70 us | 47 / 281 us | 1.7 GB, 0.4 ms "
            "| {ours.us:.0f} us at {ours.rows:.0f} tokens, bf16, with the gather |",
            ours=update(case="Llama-2-7B, neuron, 512 tokens, sgd"),
        ),
        line(
            "| Llama-3-8B, Mistral-7B | Adam | 305 MB | 71 / 71 us | 71 / 91 us | 71 / 365 us | 5.7 GB, 1.3 ms "
            "| not measured |"
        ),
        line("| GPT-J | Adam | 349 MB | 81 / 81 us | 81 / 104 us | 81 / 418 us | 6.5 GB, 1.5 ms | not measured |"),
        line(
            "| Gemma-3-270M | Adam | 6.8 MB | 1.6 / 1.6 us | 1.6 / 2 us | 1.6 / 8 us | 0.13 GB, 30 us | not measured |"
        ),
    ),
    "gpu-ties-merge": Table(
        "| projection | shards | trim | merge | together | measured |",
        line(
            "| Llama-2-7B | 2 | 79 MB, 18 us | 137 MB, 32 us | 50 us "
            "| {ours.us:.0f} us a call, launches and two waits included |",
            ours=merge(case="Llama-2-7B, neuron, 2 shards"),
        ),
        line(
            "| Llama-2-7B | 4 | 159 MB, 37 us | 251 MB, 58 us | 95 us | {ours.us:.0f} us a call |",
            ours=merge(case="Llama-2-7B, neuron, 4 shards"),
        ),
        line("| Llama-3-8B, Mistral-7B | 2 | 103 MB, 24 us | 178 MB, 42 us | 66 us | not measured |"),
        line("| GPT-J | 2 | 118 MB, 27 us | 204 MB, 47 us | 74 us | not measured |"),
        line("| Gemma-3-270M | 2 | 2.3 MB, 0.5 us | 4 MB, 0.9 us | 1.4 us and 13 launches | not measured |"),
    ),
    "gpu-scoring": Table(
        "| op | memories | least, us | ours, us | plain, us |",
        *(
            scored(f"| {op} | {{ours.memories:.0f}} | {{ours.bound_us:.0f}} |", norms(memories=memories))
            for op, memories in (("`dual_forward`, projection and norms", 1), ("", 4), ("", 16), ("", 64))
        ),
        scored(
            "| `sketched_route`, 64 wide, as it was: gathered | {ours.memories:.0f} | {ours.bound_us:.0f} |",
            sketched(rows=512),
        ),
        scored("| `leverage`, rank 64, as it was | {ours.memories:.0f} | {ours.bound_us:.1f} |", leverage(memories=4)),
        scored("| | {ours.memories:.0f} | {ours.bound_us:.0f} |", leverage(memories=64)),
        *(
            line(
                f"| {op} | {{ours.memories:.0f}} | launch | {{ours.us:.1f}} | {{plain.us:.0f}} |",
                ours=route(memories=memories),
                plain=route(memories=memories, arm="plain"),
            )
            for op, memories in (("`route`, as it was", 1), ("", 16), ("", 64))
        ),
    ),
}
