"""Everything that run records decide: the tables and pictures of figures/, and the generated block of README.md.

    python tools/results.py             write figures/ and README.md (`make results`)
    python tools/results.py --readme    README.md alone (`make readme`)
    python tools/results.py --check     change nothing, name what differs, and fail if anything does

Records are read from figures/records. A table or picture appears as soon as its records are there, and goes when they go.
What needs more than records (probabilities, weights) is listed in `KEPT`; it comes from an executed notebook and is left alone.
"""
import sys
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from pandas import DataFrame

from avvp_nb.core import InputError, content_hash
from avvp_nb.data.sources import SCALES, DataSpec, identify, load_data
from avvp_nb.methods.coleaf import READINGS
from avvp_nb.methods.method import network_sizes
from avvp_nb.methods.zoo import METHODS
from avvp_nb.records.spec import RunSpec
from avvp_nb.records.store import whole_record
from avvp_nb.results import claims_page, figures_coleaf, figures_dgm, figures_han
from avvp_nb.results.claims import LEAST, UNTRAINED, judge_claims
from avvp_nb.results.compare import compare, printed_rows, rules_table, stack
from avvp_nb.results.cost import cost_table, plot_tokens
from avvp_nb.results.errata import errata
from avvp_nb.results.findings import EXPERIMENTS, findings, main_findings, tested_text
from avvp_nb.results.gains import gained, over
from avvp_nb.results.groups import (
    EARLY,
    SELECTED,
    dataset_of,
    has_selected,
    mark_of,
    provenance,
    run_name,
    scale_of,
    seeds_text,
)
from avvp_nb.results.intervals import VideoScores
from avvp_nb.results.plans import collect, default_seeds, draw, plan
from avvp_nb.results.plots import (
    class_name,
    data_provenance,
    plot_losses,
    plot_modulation,
    plot_terms,
    save_figure,
)
from avvp_nb.results.reported import AVG, method_name, reported
from avvp_nb.results.rows import DATASET, RATES, TABLES, System, all_tables, experiment, system_of
from avvp_nb.results.rules import (
    against_nothing,
    cross_table,
    headline,
    only_table,
    ranking,
    rule_share,
    selection_effect,
    settings,
)
from avvp_nb.results.signals import crossed_told, decided, over_bases, uncrossed
from avvp_nb.results.systems import cards, plot_cost, plot_family, system_names, system_spec, with_runs
from avvp_nb.results.table import table_of
from avvp_nb.results.verify import repeats_table, repeats_text
from avvp_nb.runs.reproduce import gain_block

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
START, END = "<!-- results -->", "<!-- /results -->"
HERE = "tools/results.py"
MADE = {".json", ".md", ".html", ".tex", ".csv", ".svg", ".png"}   # what tables and pictures are made of; nothing else is ever removed
KEPT = {   # needs probabilities or weights, so an executed notebook made it: stem -> notebook
    **dict.fromkeys(["han_fig4_pooling", "han_fig5_asynchronous"], "han"), "dgm_fig4_timelines": "dgm",
    **dict.fromkeys(["ma_fig2_swap", "ma_fig3_parsing", "ma_fig4_refined", "ma_fig4_removed", "tables/ma_removed"], "ma"),
    "coleaf_fig3_events": "coleaf", "tables/zoo_refinements": "zoo"}


# ---------------------------------------------------------------- records

def committed():
    "All committed run records"
    return [whole_record(p) for p in sorted((FIGURES / "records").glob("*.json"))]


@cache
def identity(dataset, labels=None):
    "Fingerprint of the data that a run on simulated clips has by default"
    with tempfile.TemporaryDirectory() as folder: return content_hash(identify(DataSpec(dataset=dataset), folder)[0])


def at(records, scale, dataset="llp"):
    "Records of a scale on the simulated clips of a data set"
    return [r for r in records if scale_of(r) == scale and dataset_of(r) == dataset
            and content_hash(r["data"]["identity"]) == identity(dataset)]


def of(records, system, **options):
    "Records of a `System`, or of the printed row of this name, the seeds in order; `options` change its own"
    if not records: return []
    if isinstance(system, str): system = system_of(system)
    wanted = experiment(RunSpec(system.method, {**system.options, **options}, system.backbone, labels=system.labels,
                                scale=scale_of(records[0])).plain())
    return sorted((r for r in records if experiment(r["spec"]) == wanted), key=lambda r: r["seed"])


def most(records, *methods):
    "Records of the largest scale at which all of these systems were run, a list for each"
    for scale in ("full", "small", "tiny"):
        found = [of(at(records, scale), m) for m in methods]
        if all(found): return found
    return []


# ---------------------------------------------------------------- tables

def enough(paper, table, runs, scale):
    "Two rows; for rates the cells that all seeds of the only row have kept"
    if (paper, table) not in RATES: return len(runs) > 1
    return bool(runs) and VideoScores(FIGURES, scale).has(*(r for rs in runs.values() for r in rs))


def planned(records):
    "The printed tables of rates, and those of which two rows or more were run, each with its gains: (stem, table)"
    for scale in SCALES:
        for paper, table in all_tables():
            data = DataSpec(dataset=DATASET.get((paper, table), "llp"))
            found = at(records, scale, data.dataset)
            runs = collect(plan(paper, table, scale, default_seeds(scale), data), found)
            if not enough(paper, table, runs, scale): continue
            seeds = sorted({r["seed"] for rs in runs.values() for r in rs})
            wanted, stem = plan(paper, table, scale, seeds, data), f"{paper}_{table}_{scale}_simulated"
            yield stem, draw(wanted, found, FIGURES, data="simulated")
            block = gain_block(wanted, found, data="simulated")
            if block is not None: yield f"{stem}_gains", block


def by_rule(records):
    "What decision rules, selection metrics and empty videos do: (stem, table)"
    for scale in SCALES:
        main = headline(at(records, scale))
        if len(main) < 2: continue
        stem, han = f"{scale}_simulated", method_name("han")
        yield f"rules_{stem}", cross_table(main, notebook=HERE)
        yield f"selection_{stem}", selection_effect(main)
        if han in main:
            yield f"rule_share_{stem}", stack([rule_share(rs, main[han], name=f"{n} over {han}")
                                               for n, rs in main.items() if n != han])
        have = {n: rs for n, rs in main.items() if all(r.get("only") for r in rs)}
        if have: yield from ((f"only_{stem}", only_table(have)), (f"ranking_{stem}", ranking(have)))


PARTS = {"MSDU, no modulation": {"modulate": False}, "noise alone (γ=0)": {"gamma": 0.}, "no noise": {"noise": False},
         "update scaled": {"apply": "update"}, "update scaled, no noise": {"apply": "update", "noise": False},
         "encoders only": {"target": "encoder"}, "no MSDU": {"msdu": False}, "no MSDU, shared split": {"msdu": False, "shared": "split"}}


def taken_apart(records):
    "DGM with one ingredient changed, on either network: (stem, table)"
    for scale in SCALES:
        for on, whole in (("han", "dgm+msdu@han"), ("jomold", "dgm+msdu")):
            found, base = at(records, scale), method_name(on)
            parts = {base: of(found, on), f"{base} + DGM + MSDU": of(found, whole)}
            parts |= {k: of(found, whole, **v) for k, v in PARTS.items()}
            parts |= {name: of(found, System(m, {"gamma": .1}, on)) for m, name in (("ogm", "OGM"), ("ogm_ge", "OGM-GE"))}
            parts = {k: rs for k, rs in parts.items() if rs}
            if len(parts) < 4 or base not in parts: continue
            yield f"dgm_parts_{on}_{scale}", compare(parts, floors=False, caption=f"DGM on {base}, taken apart, at scale {scale}")
            yield f"dgm_parts_{on}_{scale}_gains", over(parts, base, caption=f"DGM on {base}, taken apart: gain over {base}")


def one_paper(records):
    "Tables of single pages: (stem, table)"
    tiny, notebook = at(records, "tiny"), "nbs/coleaf.ipynb"
    if of(tiny, "coleaf"):
        for setting, table in settings(plan("coleaf", "6", "tiny", (1,)), tiny, notebook=notebook).items():
            yield f"coleaf_6_{setting}", table
    for number in "67": yield f"coleaf_{number}_nothing", against_nothing("coleaf", number)
    pair = {n: of(tiny, m) for n, m in (("CMPAE", "cmpae"), ("CoLeaF", "coleaf"))}
    ways = {"fixed thresholds": None, "searched with the kept weights": SELECTED, "searched early": EARLY}
    rule = {f"{n}, {w}": r for n, rs in pair.items() for w, r in ways.items() if rs and all(r is None or has_selected(x, r) for x in rs)}
    if rule:
        yield "coleaf_thresholds", compare({k: pair[k.split(",")[0]] for k in rule}, rule=rule, floors=False, average=False,
                                           metrics=("A", "V", "AV", "Ao", "Vo"), caption="Fixed and selected thresholds, tiny")
    readings = {k: {f: str(getattr(READINGS[v], f)) for f in READINGS[v].__dataclass_fields__} for k, v in (("paper", "paper"), ("code", "official"))}
    yield "coleaf_readings", table_of(DataFrame(readings), "CoLeaF: two readings", notebook=notebook)
    yield "coleaf_cost", cost_table()
    yield "errata", errata(list(TABLES))
    stages = {"MA base": of(tiny, "ma_cl_only"), "MA": of(tiny, "ma")}
    if all(stages.values()):
        printed = {"MA base": reported("ma", 2, "ma_cl_only"), "MA": reported("ma", 2, "ma")}
        yield "ma_stages", compare(stages, printed, caption="Stage 1 and stage 3 beside MA, Table 2, tiny", notebook="nbs/ma.ipynb")
    if of(tiny, "han"): yield "han_rules", rules_table(of(tiny, "han"), "HAN under every rule, tiny")


def systems(records, scale):
    "The runs of every system that was run on LLP at a scale: {name: records}"
    here = at(records, scale)
    def runs(n):
        wanted = experiment(system_spec(n, scale=scale).plain())
        return sorted((r for r in here if experiment(r["spec"]) == wanted), key=lambda r: r["seed"])
    return {n: rs for n in system_names() if (rs := runs(n))}


def zoo_scales(records):
    "Scales at which there are runs of several systems: (scale, end of a stem, how many seeds in words, {name: records}, all records)"
    for scale, end in (("tiny", ""), ("small", "_small")):
        found = systems(records, scale)
        if len(found) > 2: yield scale, end, seeds_text(map(len, found.values())), found, [r for rs in found.values() for r in rs]


def zoo(records):
    "All systems in one table: (stem, table)"
    for scale, end, seeds, found, flat in zoo_scales(records):
        columns = ["system", "year", "idea", "builds on", "parameters", "operations", "epochs", "seconds", "ours", "printed", "printed in"]
        if seeds != "1 seed": columns.insert(4, "seeds")
        table = with_runs(cards(list(found), scale), found).astype({"seeds": int})[columns].set_index("system")
        yield f"zoo_systems{end}", table_of(table, f"All systems at scale {scale}, {seeds}", flat, notebook="nbs/zoo.ipynb")
        yield f"zoo_scores{end}", compare({method_name(n): rs for n, rs in found.items()}, caption=f"All systems at scale {scale}, F-scores in %")


def to_judge(records):
    "Scales at which two systems or more were trained with seeds enough for a verdict: (scale, records)"
    for scale in (s for s in SCALES if s not in UNTRAINED):
        seeds = Counter(experiment(r["spec"]) for r in at(records, scale))
        if sum(n >= LEAST for n in seeds.values()) > 1:
            yield scale, [r for d in ("llp", *DATASET.values()) for r in at(records, scale, d)]


@cache
def verdict_lines(scale):
    "Every line of the claims with its verdict, from the committed records; intervals of single runs come from the scores of their videos"
    return judge_claims(FIGURES, list(TABLES), scale)


def judged(records):
    "Verdicts and findings: (stem, table)"
    for scale, here in to_judge(records):
        lines = verdict_lines(scale)
        yield f"claims_overview_{scale}_simulated", claims_page.overview(lines)
        for p in TABLES: yield f"claims_{p}_{scale}_simulated", claims_page.claims_table(lines, p)
        for e in EXPERIMENTS:
            found = findings(e, here, scale)
            if found.records: yield f"findings_{e}_{scale}", found.table()


WEAK = {"as chosen": ("yamnet", "efficientnet"), "sound weak": ("log-mel", "efficientnet"), "pictures weak": ("yamnet", "thumbnail")}


@cache
def others():
    "The other records of runs that were made twice: key -> record"
    return {r["key"]: r for r in map(whole_record, sorted((FIGURES / "records" / "repeats").glob("*.json")))}


def made_twice(records):
    "Those of the records that were made twice with the same seed: (the later ones, the earlier ones)"
    pairs = [sorted((r, others()[r["key"]]), key=lambda r: r["finished"]) for r in records if r["key"] in others()]
    return [b for _, b in pairs], [a for a, _ in pairs]


def repeats(records):
    "The same seed twice: (stem, table)"
    for scale in SCALES:
        again, before = made_twice(at(records, scale))
        if again: yield f"repeats_{scale}", repeats_table(again, before)


def of_signals():
    "Committed records of real signals: (scale, description of sound, of pictures) -> label -> records, HAN first, then by year"
    found, order = {}, ["han", *system_names()]
    def whole(spec): return spec["method"] in order and spec["options"] == RunSpec(spec["method"], backbone=spec["backbone"]).plain()["options"]
    records = [whole_record(p) for p in sorted((FIGURES / "records" / "signals").glob("*.json"))]
    records = [r for r in records if dataset_of(r) == "signals" and whole(r["spec"])]      # no stage before a system, no simulator beside
    for r in sorted(records, key=lambda r: (order.index(r["spec"]["method"]), run_name(r["spec"]), r["seed"])):
        said = r["data"]["identity"]
        found.setdefault((scale_of(r), said["sound"], said["pictures"]), {}).setdefault(run_name(r["spec"]), []).append(r)
    return found


def real_signals(_):
    "Systems on timelines of real sounds and pictures, from records of their own: (stem, table)"
    found, notebook = of_signals(), "nbs/signals.ipynb"
    for scale in SCALES:
        by = {level: found.get((scale, *kinds), {}) for level, kinds in WEAK.items()}
        main = by["as chosen"]
        if len(main) < 2: continue
        flat = [r for rs in main.values() for r in rs]
        yield f"signals_{scale}", compare(main, caption=f"Real signals: systems at scale {scale}, F-scores in %", notebook=notebook)
        yield f"signals_{scale}_gains", over(main, "HAN", caption=f"Real signals: gain over HAN at scale {scale}", notebook=notebook)
        for base, rs in main.items():                                            # systems on another network than HAN's
            method = rs[0]["spec"]["method"]
            on = {k: x for k, x in main.items() if x[0]["spec"]["backbone"] == method}
            if base != "HAN" and base in on and len(on) > 1:
                yield f"signals_{scale}_gains_{method}", over(on, base, caption=f"Real signals: gain over {base}", notebook=notebook)
        caption = f"Real signals: gain over HAN in the mean of ten scores, at scale {scale}"
        yield f"signals_{scale}_decided", table_of(decided(main), caption, flat, notebook=notebook)
        dgm = "DGM+MSDU on HAN"
        gains = {k: gained(rs[dgm], rs["HAN"]) for k, rs in by.items() if {dgm, "HAN"} <= rs.keys()}
        if len(gains) > 1:
            cells = {k: {"gain of DGM+MSDU over HAN": str(g), "seeds": g.seeds} for k, g in gains.items()}
            behind = [r for rs in by.values() for n in ("HAN", dgm) for r in rs.get(n, [])]
            caption = f"Real signals: DGM where one modality is weak, at scale {scale}"
            yield f"signals_{scale}_weak", table_of(DataFrame(cells).T, caption, behind, notebook=notebook)


def tables(records):
    "Every table that records decide: stem -> `Table`"
    return {stem: t for part in (planned, by_rule, taken_apart, one_paper, zoo, judged, repeats, real_signals) for stem, t in part(records)}


# ---------------------------------------------------------------- pictures

def from_runs(records):
    "Pictures of run records: (stem, figure, provenance)"
    pair = most(records, "jomold", "dgm+msdu")
    if pair:
        names, source = ("JoMoLD", "JoMoLD + DGM + MSDU, γ=0.1"), provenance([*pair[0], *pair[1]], notebook="nbs/dgm.ipynb")
        yield "dgm_fig5_losses", plot_losses(*pair, names=names), source
        yield "dgm_modulation", plot_modulation(pair[1]), source
        curves = {n: figures_dgm.score_curves(rs) for n, rs in zip(names, pair)}
        yield "dgm_fig1_scores", figures_dgm.plot_scores(curves, mark_of(pair[1])), source
    for m in most(records, "han")[:1]: yield "han_losses", plot_terms(m), provenance(m, notebook="nbs/han.ipynb")
    pair = most(records, "ma_cl_only", "ma")
    if pair: yield "ma_losses", plot_terms({"stage 1": pair[0], "stage 3": pair[1]}), provenance([*pair[0], *pair[1]], notebook="nbs/ma.ipynb")
    pair = most(records, "cmpae", "coleaf")
    if pair:
        source = provenance([*pair[0], *pair[1]], notebook="nbs/coleaf.ipynb")
        yield "coleaf_losses", plot_terms({"CMPAE": pair[0], "CoLeaF": pair[1]}, ["audio", "visual", "video"]), source
        yield "coleaf_exchange", figures_coleaf.plot_exchange(pair[1]), provenance(pair[1], notebook="nbs/coleaf.ipynb")
    for scale, end, _, found, _ in zoo_scales(records):
        first = {n: rs[:1] for n, rs in found.items()}     # as many seeds of each
        flat = [r for rs in first.values() for r in rs]
        yield f"zoo_cost{end}", plot_cost(with_runs(cards(list(first), scale), first), "ours", mark_of(flat)), provenance(flat)


def verdicts(records):
    "Pictures of verdicts and of one claim: (stem, figure, provenance)"
    for scale, _ in to_judge(records):
        lines = verdict_lines(scale)
        behind = {p: claims_page.claims_table(lines, p).provenance for p in TABLES}
        for p in TABLES: yield f"claims_{p}_{scale}_simulated", claims_page.plot_verdicts(lines, p), behind[p]
        yield f"claim_D-general-han_{scale}_simulated", claims_page.plot_claim(lines, "D-general-han"), behind["dgm"]


def from_data(_):
    "Pictures of the simulated clips and of the networks: (stem, figure, provenance)"
    with tempfile.TemporaryDirectory() as folder: data = load_data(DataSpec(), "tiny", folder)
    test, truth = data["test"], (data["test"].dense_audio, data["test"].dense_visual)
    apart = figures_han.asynchronous(*truth, test.ids)
    for stem, part, nb in (("han_fig1_task", apart, "han"), ("coleaf_fig1_task", apart[apart["both"] > 0].reset_index(drop=True), "coleaf")):
        video, clip, name = figures_han.pair_to_show([part, apart], *truth, test.ids)
        fig = figures_han.plot_task(truth[0][video], truth[1][video], name, features=(test.audio[video], test.frames[video]),
                                    mark=test.mark, title=f"{class_name(name)} in {clip}")
        yield stem, fig, data_provenance(test, f"nbs/{nb}.ipynb", video=clip, scale="tiny")
    source = data_provenance(test, "nbs/han.ipynb", scale="tiny")
    counts = figures_han.event_counts(*((data[s].dense_audio, data[s].dense_visual) for s in ("val", "test")))
    yield "han_fig2_events", figures_han.plot_event_counts(counts, test.mark), source
    samples = apart.drop_duplicates("index")[:3]
    yield "han_fig2_samples", figures_han.plot_samples(*truth, samples, test.ids, mark=test.mark), source
    yield from networks(data["train"])


def networks(train):
    "Diagrams drawn from the modules: (stem, figure, provenance)"
    sizes, drawn = network_sizes(train), partial(data_provenance, None)
    def built(method, backbone=None): return METHODS[method].build(RunSpec(method, backbone=backbone, scale="tiny").plain(), sizes)
    plain, dgm, (net, _, callbacks) = built("jomold")[0], built("dgm", "jomold")[0], built("coleaf")
    references = next(c.references for c in callbacks if hasattr(c, "references"))
    yield "han_fig3_pipeline", figures_han.diagram_han(built("han")[0]), drawn("nbs/han.ipynb")
    yield "dgm_fig2_framework", figures_dgm.diagram_dgm(dgm), drawn("nbs/dgm.ipynb")
    yield "dgm_fig3_pipelines", figures_dgm.diagram_pipelines(plain, dgm), drawn("nbs/dgm.ipynb")
    yield "coleaf_fig2_framework", figures_coleaf.diagram_coleaf(net, references), drawn("nbs/coleaf.ipynb")
    yield "coleaf_cost", plot_tokens(), drawn("nbs/coleaf.ipynb")
    yield "zoo_family", plot_family(), drawn("nbs/zoo.ipynb")


def write(records, folder):
    "Every table and picture below a folder, as figures/ has them"
    import matplotlib
    matplotlib.use("Agg")
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for stem, table in tables(records).items(): table.save(folder / "tables" / stem)
    for part in (from_runs, verdicts, from_data):
        for stem, fig, source in part(records):
            save_figure(fig, folder / stem, source)
            matplotlib.pyplot.close(fig)


# ---------------------------------------------------------------- what stands in README.md

GAINS = (   # a gain in words, both systems, printed table, key
    ("DGM + MSDU over HAN", "dgm+msdu@han", "han", ("dgm", "VII"), AVG),
    ("DGM + MSDU over JoMoLD", "dgm+msdu", "jomold", ("dgm", "VII"), AVG),
    ("JoMoLD over HAN", "jomold", "han", ("dgm", "VII"), AVG),
    ("MA over HAN", "ma", "han", ("ma", "1"), ("segment", "Type@AV")),
    ("CoLeaF over CMPAE, its Anchor", "coleaf", "cmpae", ("coleaf", "5"), ("event", "Vo")),
    ("CoLeaF on HAN over HAN", "coleaf@han", "han", ("coleaf", "5"), ("event", "Vo")))


def printed_number(table, method, key):
    "A printed score; AVG is the mean of ten"
    return printed_rows(reported(*table, method, variant=""))[0].mean[key]


def gain_line(records, name, ours, base, table, key):
    "A line of the README's table"
    both = [of(records, m) for m in (ours, base)]
    printed = f"{printed_number(table, ours, key) - printed_number(table, base, key):+.1f}"
    got = gained(*both, key) if all(both) else None
    seeds = f"{got.seeds} seed{'s' * (got.seeds > 1)}" if got else ""
    told = f"{got} ({seeds})" if got else "not run yet"
    score = "mean of ten scores" if key == AVG else " ".join(key)
    return f"| {name} | {score} | {printed} | {told} |".replace("-", "−")


def calibration(records):
    "One sentence: HAN at the scale at which the simulator was calibrated"
    rs = [r for r in records if scale_of(r) == "calibration" and r["spec"]["method"] == "han"]
    if not rs: return ""
    ours, theirs = compare({"HAN": rs}, floors=False).rows[0].mean[AVG], printed_number(("dgm", "VII"), "han", AVG)
    return (f"The simulator was calibrated on one printed row, HAN's: the mean of its ten scores is {ours:.2f} here and {theirs:.2f} "
            "in print. Every other level is the simulator's, so gains are compared and levels are not.")


def at_full(records):
    "A sentence: the gains of the table with the papers' own protocols, as far as they were run"
    full = at(records, "full")
    runs = {name: (of(full, ours), of(full, base), key) for name, ours, base, _, key in GAINS}
    gains = {name: gained(ours, base, key) for name, (ours, base, key) in runs.items() if ours and base}
    if not gains: return ""
    n, told = min(g.seeds for g in gains.values()), "; ".join(f"{k} {g}" for k, g in gains.items())
    few = "one seed, which decides nothing" if n == 1 else f"{n} seeds"
    return f"With the papers' own protocols (scale full: 10,000 videos, all epochs; {few}), in the same scores: {told}."


def what_matters(records, scale="small"):
    "The findings that matter most, and where the others are"
    few, tested, asked = main_findings(records, scale)
    lines = "\n".join(f"- {f.sentence}" for f in few)
    told = f"What matters most (points, intervals of 95 %, three seeds or more):\n\n{lines}\n\n" if few else ""
    return (f"{told}{tested_text(tested, asked)} Every experiment page ends with its own findings, and [claims](nbs/claims.ipynb) judges every claim of the four papers.")


def on_real_signals(small, scale="small"):
    "What systems gain on timelines of real sounds and pictures, and what turns round there"
    main = of_signals().get((scale, *WEAK["as chosen"]), {})
    gains = {f"{k} over HAN": gained(main[k], main["HAN"]) for k in ("MA", "JoMoLD", "CoLeaF", "DGM+MSDU on HAN") if k in main}
    gains |= over_bases(main)
    if not gains: return ""
    told, n = ", ".join(f"{k.replace(' on JoMoLD', '')} {g}" for k, g in gains.items()), min(g.seeds for g in gains.values())
    return (f"On timelines composed of real sounds and pictures, which are not LLP (scale {scale}, {n} seeds, mean of ten scores): {told}. "
            f"{turned_round(main, small, scale)}[signals](nbs/signals.ipynb) has the tables.")


def turned_round(main, small, scale):
    "A sentence on JoMoLD with and without attention across modalities, here and on the simulator, or nothing"
    beside = [whole_record(p) for p in sorted((FIGURES / "records" / "signals").glob("*.json"))]
    store = SimpleNamespace(record={r["key"]: r for r in [*small, *beside]}.get)
    there = of([*small, *at(beside, scale)], "jomold")
    real = uncrossed(main, store)
    return f"{crossed_told(real, uncrossed({'JoMoLD': there}, store))} " if real else ""


def twice(records):
    "A sentence on runs that were made twice"
    again, before = made_twice(records)
    return repeats_text(again, before) if again else ""


def took(records):
    "Median training time of the three networks of the main job, and on what"
    found = {"the noise estimator": of(records, System("jomold_estimator")), "JoMoLD": of(records, "jomold"),
             "JoMoLD with DGM + MSDU": of(records, "dgm+msdu")}
    if not all(found.values()): return ""
    times = {n: median(r["wall_time"] for r in rs) / 60 for n, rs in found.items()}
    hw = found["JoMoLD"][0]["hardware"]
    where = f"{hw.get('gpu') or hw['processor']}, {hw['threads']} thread{'s' * (hw['threads'] > 1)}"
    parts = ", ".join(f"{t:.1f} min for {n}" for n, t in times.items())
    return f"`make dgm` trained {sum(times.values()):.0f} min on {where}, busy with other work: {parts}."


def block():
    "The generated text"
    records = committed()
    small = at(records, "small")
    head = "| gain in points | score | printed | ours, simulated, small |\n|---|---|---:|---:|"
    table = "\n".join([head, *(gain_line(small, *g) for g in GAINS)])
    parts = [table, "Printed gains are differences of single runs on real features; ours have a 95 % interval over seeds, and none for one seed.",
             at_full(records), calibration(records), what_matters(small), on_real_signals(small), twice(small), took(small)]
    return "\n\n".join(filter(None, parts))


def readme(text):
    "README text with a fresh block"
    before, rest = text.split(START)
    return f"{before}{START}\n{block().strip()}\n{END}{rest.split(END)[1]}"


# ---------------------------------------------------------------- command

def stems(folder):
    "Tables and pictures of figures/: path without suffix -> files. Other folders and other kinds of files are nobody's business here"
    out = {}
    for p in sorted([*folder.glob("*"), *folder.glob("tables/*")]):
        where = p.relative_to(folder)
        if p.is_file() and p.suffix in MADE and where.name != "README.md":
            out.setdefault(where.with_suffix("").as_posix(), []).append(p)
    return out


def differences(made):
    "Files of figures/ that are missing, differ, or that nothing makes any more"
    new = {p.relative_to(made): p.read_bytes() for ps in stems(made).values() for p in ps}
    old = {p.relative_to(FIGURES): p.read_bytes() for k, ps in stems(FIGURES).items() if k not in KEPT for p in ps}
    return {k: new.get(k) for k in sorted({*new, *old}) if new.get(k) != old.get(k)}


def main(args):
    "Write, or only look"
    path, found = ROOT / "README.md", {}
    if "--readme" not in args:
        with tempfile.TemporaryDirectory() as folder:
            write(committed(), Path(folder))
            found = differences(Path(folder))
    new = readme(path.read_text(encoding="utf-8"))
    if new != path.read_text(encoding="utf-8"): found[Path("../README.md")] = new.encode()
    for name, data in found.items():
        print(name, "goes" if data is None else "differs or is new")
        if "--check" in args: continue
        if data is None: (FIGURES / name).unlink()
        else: (FIGURES / name).write_bytes(data)
    return int(bool(found) and "--check" in args)


if __name__ == "__main__":
    try: sys.exit(main(sys.argv[1:]))
    except InputError as e: sys.exit(str(e))
