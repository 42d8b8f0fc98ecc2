"""Tables of what is measured on a CPU: quality, editing, serving, memory, storage, and what else has rows."""

from __future__ import annotations

from bench.cells import Line, Rows, Table, line

RUN = "fe5aa5f"
NOW = "1229506"
quality = Rows("quality.csv", NOW)
streams = Rows("lifelong.csv", NOW)
by_default = streams(method="wise_fast", command="*--T 500*")
rehearsed = streams(settings='*"rehearsals":14*')
side_by_side = streams(command="*--T 10 *")
alone_500 = Rows("lifelong.csv", "63eb504")(T=500)
merged = Rows("lifelong.csv", "6bc9d8a")(task="qa", T=300)
ties = Rows("lifelong.csv", "a948f75")(settings='*"merging":"ties"*', T=300)
passages = Rows("lifelong.csv", "1db216d")(task="hallucination", T=100)
temporal = Rows("lifelong.csv", "6bc9d8a")(task="temporal", T=40)
editing = Rows("editing.csv", NOW)
memory = Rows("memory.csv", RUN)(metric="load and one edit: peak above the loaded model")
storage = Rows("storage.csv", RUN)(case="50 edits")
serving = Rows("serving.csv", "fc7f934")(metric="ratio to unedited, by round")
prefill = serving(command="*--rounds 101*", case="prefill 1 x 32")
prefill_batch = Rows("serving.csv", "38f9401")(metric="ratio to unedited, by round", case="prefill 8 x 64")
decode, decode_batch = (serving(case=f"decode 8 tokens after 16, batch {size}") for size in (1, 8))
families = Rows("families.csv", "6bc9d8a")(T=200)
ops = Rows("ops.csv", "00d4bee")
dense = Rows("dense.csv", "c1d7d7a")
distributed = Rows("distributed.csv")
ablation = Rows("ablation.csv", "e21404d")

alone, batches = editing(case="ours, one at a time"), editing(case="ours, batches of 8")
baseline = editing(case="baseline, extrapolated: *", metric="time per edit")
SPEEDUP, TIME = "speed-up over the baseline", "time per edit"
QUESTIONS = "{run.reliability:.3s} | {run.generalization:.3s} | | "
SCORES = "{run.reliability:.3s} | {run.generalization:.3s} | {run.locality:.3s}"

PARTS = (
    "the defaults",
    "scores as the paper's, the norm alone",
    "no protection of earlier edits",
    "unrelated text is not protected",
    "subjects are not asked for",
    "no limit of newness",
    "no neighbours",
    "no prefixes",
    "memories of 25, rehearsed",
)

OPS = (
    "decode, neuron, 1 rows, in scope",
    "decode, neuron, 1 rows, out of scope",
    "decode, neuron, 8 rows, in scope",
    "decode, neuron, 8 rows, out of scope",
    "decode, element, 1 rows, in scope",
    "decode, element, 1 rows, out of scope",
    "decode, element, 8 rows, in scope",
    "decode, element, 8 rows, out of scope",
    "decode, neuron, 8 rows, 16 memories, in scope",
    "prefill, neuron, 256 rows",
    "prefill, element, 256 rows",
    "prefill, neuron, 64 rows, 4 memories",
    "prefill, element, 64 rows, 4 memories",
    "norms, neuron, 64 rows, 1 memories",
    "norms, neuron, 64 rows, 16 memories",
    "norms, element, 64 rows, 4 memories",
    "gated_add, neuron, 64 rows, 4 memories, response known",
    "gated_add, neuron, 64 rows, 4 memories, product",
    "gated_add, element, 64 rows, 4 memories, response known",
    "gated_add, element, 64 rows, 4 memories, product",
    "sketched_route, 64 rows, 64 memories",
    "sketched_route, 256 rows, 64 memories",
    "leverage, 64 rows, 1 memories",
    "leverage, 64 rows, 4 memories",
    "route, 64 rows, 1 memories",
    "route, 512 rows, 16 memories",
    "route, 512 rows, 64 memories",
    "masked_update, neuron, 256 tokens, adam",
    "masked_update, neuron, 256 tokens, sgd",
    "masked_update, element, 256 tokens, adam",
    "masked_update, element, 256 tokens, sgd",
    "ties_merge, neuron, 2 shards",
    "ties_merge, element, 2 shards",
)


def arm(rows: Rows, name: str) -> Rows:
    """One arm of a case of serving."""
    return rows(case=f"{rows.where['case']}: {name}")


def taught(text: str, **where: str | float) -> Line:
    cells = f"{SCORES} | {{run.exact:.2s}} | {{run.exact_rephrased:.2s}} | {{run.seconds_per_edit:.2f}}"
    return line(f"| {text} | {cells} |", run=quality(offset=0, **where))


def beside(text: str, rows: Rows, noise: str = "") -> Line:
    """Ours with nothing in scope, and the unedited model's twin."""
    cells = f"{{ours.value:.3s}} | {noise}{{twin.value:.3s}}"
    return line(f"| {text} | {cells} |", ours=arm(rows, "ours, nothing in scope"), twin=arm(rows, "unedited, again"))


def timed(case: str) -> Line:
    """An op on the CPU beside plain PyTorch."""
    metrics = (
        "ours: CPU time of a call",
        "plain: CPU time of a call",
        "ours / plain, by round",
        "ours / plain, p20 of each",
    )
    named = dict(
        zip(("ours", "plain", "rounds", "fast"), (ops(case=case, metric=metric) for metric in metrics), strict=True)
    )
    cells = "{ours.value:.0f} | {plain.value:.0f} | {rounds.value:.2f} | {fast.value:.2f}"
    return line(f"| {case} | {cells} |", **named)


def edited(text: str, rows: Rows) -> Line:
    cells = "{time.value:.2f} | {time.p20:.2f} to {time.p80:.2f} | {steps.value:.1f} | {hold.value:.2s} | "
    named = {"time": TIME, "steps": "steps per edit", "hold": "edits that hold", "over": SPEEDUP}
    found = {name: rows(metric=metric) for name, metric in named.items()}
    return line(f"| {text} | {cells}{{over.value:.0f}} |", **found)


def served(text: str, rows: Rows) -> Line:
    arms = ("unedited, again", "baseline", "ours, nothing in scope", "ours, all in scope")
    cells = (f"{{arm{i}.value:.3s}} ({{arm{i}.p20:.3s}} to {{arm{i}.p80:.3s}})" for i in range(len(arms)))
    found = {f"arm{i}": arm(rows, name) for i, name in enumerate(arms)}
    return line(f"| {text} | {' | '.join(cells)} | {{arm0.device}} |", **found)


def peak(text: str, metric: str) -> Line:
    ours, beside = (memory(case=case, metric=metric) for case in ("ours", "baseline"))
    return line(
        f"| {text} | {{ours.value:.0f}} | {{beside.value:.0f}} | {{ours.ratio:.2s}} |", ours=ours, beside=beside
    )


def stored(text: str, metric: str) -> Line:
    return line(f"| {text} | {{size.value:.2f}} | {{size.ratio:.2s}} |", size=storage(metric=metric))


def streamed(text: str, edits: int, more: str = "") -> Line:
    cells = f"{SCORES} | {{run.perplexity_after:.2f}}{more} | "
    cells += SCORES.replace("run", "again")
    return line(f"| {text} {edits} | {cells} |", run=by_default(T=edits), again=rehearsed(T=edits))


def lasted(commit: str, more: str = "", **where: str) -> Line:
    cells = f"{SCORES} | {{run.memories:.0f}} | {{run.served_mb:.1f}} | {{run.peak_mb:.0f}} | {{run.edit_seconds:.0f}}"
    cells += " | {run.threads:.0f}"
    run = Rows("lifelong.csv", commit)(method="wise_fast", T=500, **where)
    return line(f"| {{run.commit}}{more} | {cells} | {{run.device}} |", run=run)


def recorded(recipe: str, scores: str, rows: Rows) -> Line:
    """A run of `bench/recipes`; `scores` are its cells of quality but for locality."""
    costs = "{run.seconds_per_edit:.2f} | {run.memories:.0f} | {run.served_mb:.0f} | {run.peak_mb:.0f} | {run.commit}"
    return line(f"| {recipe} | {scores} | {{run.locality:.3s}} | {costs} |", run=rows)


def compared(text: str, edits: int, run: Rows, last: bool = True) -> Line:
    """Costs stand in the row of a method's `last` evaluation."""
    costs = "{run.seconds_per_edit:.2f} | {run.served_mb:.1f} | {run.peak_mb:.0f}" if last else " | | "
    return line(f"| {text}, {edits} edits | {SCORES} | {{run.perplexity_after:.2f}} | {costs} |", run=run(T=edits))


def family(text: str, rows: Rows) -> Line:
    cells = "{run.reliability:.3s} | {run.generalization:.3s} | {run.locality_same:.3s} | {run.locality_other:.3s} | "
    cells += "{run.exact:.3s} | {run.exact_rephrased:.3s} | {run.successes:.0f} | {run.seconds_per_edit:.2f}"
    return line(f"| {text} | {{run.knows_held_out:.3s}} | {cells} |", run=rows)


def folded(text: str, case: str) -> Line:
    metrics = {"rel": "reliability", "gen": "generalization", "loc": "locality", "perplexity": "perplexity_after"}
    found = {name: dense(case=case, metric=metric) for name, metric in metrics.items()}
    cells = "{rel.value:.3s} | {gen.value:.3s} | {loc.value:.3s} | {perplexity.value:.2f}"
    return line(f"| {text} | {cells} |", **found)


def part(what: str) -> Line:
    cells = f"{SCORES} | {{run.perplexity_after:.2f}} | {{run.untaught_in_scope:.3s}} | {{run.steps:.1f}} | "
    return line(f"| {{run.what}} | {cells}{{run.memories:.0f}} |", run=ablation(what=what))


def processes(case: str) -> Line:
    rows = distributed(case=case)
    cells = "{fill.value:.1f} | {fill.p20:.1f} to {fill.p80:.1f} | {whole.value:.1f} | {over.value:.2f}"
    fill, whole = rows(metric="filling the shards"), rows(metric="the whole command, with loading")
    return line(f"| {{fill.case}} | {cells} |", fill=fill, whole=whole, over=rows(metric="speed-up of filling"))


CPU = {
    "zsre": Table(
        "| ZsRE, default settings, one memory unless said | Rel | Gen | Loc | exact | exact, paraphrases "
        "| s an edit (median) |",
        taught("first 50 edits, batches of 8 (the default)", count=50, settings="{}"),
        taught("first 50 edits, one at a time", count=50, settings='{"batch_size":1}'),
        taught("first 10 edits, one at a time", count=10, settings='{"batch_size":1}'),
        taught("two shards of 25, merged by covariances", count=50, settings='{"shard_size":25,"mode":"merge"}'),
        taught("the same, TIES-merged", count=50, settings='{"shard_size":25,"mode":"merge","merging":"ties"}'),
    ),
    "zsre-500": Table(
        "| ZsRE, one run of 500 edits, a new memory every 50 (the default) | Rel | Gen | Loc "
        "| perplexity of held-out passages | `rehearsals=14`, `wave=8`: Rel | Gen | Loc |",
        streamed("after", 10, ", as before any edit"),
        *(streamed("after", edits) for edits in (100, 300, 500)),
    ),
    "headline": Table(
        "| | ours | beside it |",
        line(
            "| seconds an edit, first 16 edits, one at a time | {ours.value:.2f} | {paper.value:.1f}, the paper's "
            "algorithm in plain PyTorch, 70 steps (from 2): {over.value:.0f} times |",
            ours=alone(metric=TIME),
            paper=baseline,
            over=alone(metric=SPEEDUP),
        ),
        line(
            "| the same, batches of 8 | {ours.value:.2f} | {over.value:.0f} times |",
            ours=batches(metric=TIME),
            over=batches(metric=SPEEDUP),
        ),
        beside(
            "prefill 1 x 32, nothing in scope, over the unedited model (101 rounds)",
            prefill,
            noise="unedited against itself ",
        ),
        beside("prefill 8 x 64, likewise (an Intel Xeon)", prefill_batch),
        beside("decode, one sequence, likewise", decode),
        beside("decode, 8 sequences, likewise", decode_batch),
        line(
            "| saved directory of 50 edits | {saved.value:.1f} MB | {saved.ratio:.2s} of the edited matrix in fp32 |",
            saved=storage(metric="saved directory"),
        ),
        line(
            "| memory to load the model and teach one fact, above the loaded model | {ours.value:.0f} MB "
            "| {paper.value:.0f} MB |",
            ours=memory(case="ours"),
            paper=memory(case="baseline"),
        ),
    ),
    "editing": Table(
        "| first 16 edits | seconds an edit, median | 20 % to 80 % | steps | share that hold | times the baseline |",
        edited("one at a time", alone),
        edited("batches of 8", batches),
        line("| baseline, extrapolated from 2 of its 70 steps | {paper.value:.1f} | | | | |", paper=baseline),
    ),
    "serving": Table(
        "| over the unedited model | unedited, again | baseline | nothing in scope | all in scope | machine |",
        served("prefill 1 x 32", prefill),
        served("prefill 8 x 64", prefill_batch),
        served("decode, batch 1", decode),
        served("decode, batch 8", decode_batch),
    ),
    "memory": Table(
        "| MB | ours | baseline | ours / baseline |",
        peak("load and one edit: peak above the loaded model", memory.where["metric"]),
        peak(
            "the process's peak less the bytes of the weights",
            "load and one edit: the process's peak less the bytes of the weights",
        ),
    ),
    "storage": Table(
        "| 50 edits | MB | over a dense copy |",
        stored("saved directory", "saved directory"),
        stored("served bytes per memory", "served bytes per memory"),
        stored("one dense copy of the edited matrix, fp32", "one dense copy of the edited matrix"),
    ),
    "lifelong": Table(
        "| 500 edits by commit | Rel | Gen | Loc | memories | MB served | peak MB | s of editing | threads | machine |",
        *map(lasted, ("fbe766f", "bf749bf", "042169c", "54e06e1+dirty")),
        lasted("bea400e", ", `rehearsals=12`"),
        lasted("53234e1", ", `rehearsals=10`, `wave=8`"),
        lasted("8b8adef", ", `rehearsals=11`, `wave=8`"),
        lasted("cd485ed", ", `rehearsals=14`, `wave=8`"),
        lasted("c840cb2", ", `rehearsals=10`, `wave=8`"),
        lasted("d6d80fc", ", `rehearsals=14`, `wave=8`"),
        lasted("63eb504", ", `rehearsals=14`, `wave=8`"),
        lasted(NOW, ", `rehearsals=14`, `wave=8`", settings='*"rehearsals":14*'),
        lasted(NOW, settings='*"rehearsals":0*'),
    ),
    "recipes": Table(
        "| a run of `bench/recipes/` | Rel | Gen | OOD | perplexity of the targets | Loc | s an edit (median) "
        "| memories | MB served | peak MB | commit |",
        recorded("`zsre_500`: questions, a bank of memories", QUESTIONS, alone_500),
        recorded("`zsre_300_merged`: questions served from one memory", QUESTIONS, merged),
        recorded("the same, merged by TIES", QUESTIONS, ties),
        recorded("`hallucination_100`: sentences that follow a passage", " | | | {run.perplexity:.3f}", passages),
        recorded("`temporal_40`: passages on new entities", "{run.reliability:.3s} | | {run.ood:.3s} | ", temporal),
    ),
    "methods": Table(
        "| | Rel | Gen | Loc | perplexity of held-out passages | s an edit | MB served | peak MB |",
        compared("ours, by default", 10, side_by_side(method="wise_fast")),
        compared("the paper's WISE", 10, side_by_side(method="wise")),
        compared("FT-L", 10, side_by_side(method="ft-l")),
        compared("GRACE", 10, side_by_side(method="grace")),
        compared("ours, by default", 100, by_default, last=False),
        compared("FT-L", 100, Rows("lifelong.csv", "8348067")(method="ft-l")),
    ),
    "ablation": Table(
        "| edits 201 to 250 | Rel | Gen | Loc | perplexity of held-out passages | untaught prompts in scope "
        "| steps an edit | memories |",
        *map(part, PARTS),
    ),
    "families": Table(
        "| 200 edits | knows held-out questions before | Rel | Gen | Loc, same relation | Loc, another | exact "
        "| exact, rephrased | edits that hold | s an edit |",
        *(family(name, families(family=name, settings="{}")) for name in ("gpt2", "gptj", "llama", "mistral")),
        family("llama, before the last token had a say", Rows("families.csv", "de58e74")(family="llama")),
    ),
    "ops": Table(
        "| case, fp32 | ours, us | plain, us | ours / plain, by round | p20 of each |",
        *map(timed, OPS),
    ),
    "dense": Table(
        "| | Rel | Gen | Loc | perplexity of held-out passages |",
        folded("20 ZsRE edits in one memory, routed", "20 edits, 1 memories, routed"),
        folded("folded into the weight", "20 edits, 1 memories, ties"),
        folded("10 packaged edits in two memories, routed", "10 edits, 2 memories, routed"),
        folded("TIES-merged and folded", "10 edits, 2 memories, ties"),
        folded("summed and folded", "10 edits, 2 memories, sum"),
    ),
    "distributed": Table(
        "| | filling the shards, s | 20 % to 80 % | the whole command, s | speed-up of filling |",
        processes("2 shards of 8 edits, 1 process"),
        processes("2 shards of 8 edits, 2 processes"),
    ),
}
