"""The explorer's JavaScript against the library, and the page in a browser."""

import json
import random
import re
import shutil
import subprocess
from importlib.resources import files

import pytest

from pi_attention import PiPattern
from pi_attention.accounting import attention_flops, cache_tokens, visible_pairs
from pi_attention.explorer import _fields, write_explorer
from pi_attention.heads import coordinated_heads, coprime_periods, geometric_periods
from pi_attention.receptive_field import joint_coverage, positions_of, receptive_field
from pi_attention.stack import DENSE, stacked

PAGE = files("pi_attention").joinpath("explorer.html").read_text()
COMPARED = 600
CELLS = [(0, 0), (3, 0), (9, 0), (9, 3), (30, 3), (60, 6), (90, 6), (6, 9)]


def drawn(seed):
    random.seed(seed)
    heads = random.choice([1, 1, 2, 3])
    periods = tuple(random.randint(1, 40) for _ in range(heads))
    if random.random() < 0.3:  # heads that share the distance
        periods = (periods[0],) * heads
    phases = tuple(random.randrange(period) for period in periods) if random.random() < 0.7 else (0,) * heads
    pattern = PiPattern(
        random.randint(1, 30),
        periods if heads > 1 else periods[0],
        random.randint(0, 6),
        sinks=random.choice([0, 0, 1, 4]),
        phase=phases if heads > 1 else phases[0],
    )
    own = PiPattern(random.randint(1, 30), 1, 0, sinks=random.choice([0, 2]))
    kinds = ["pi"] if seed % 2 else random.choices(["pi", "local", "all-skips", "dense", own], k=random.randint(1, 4))
    kinds = kinds if pattern.skips else ["local" if kind == "all-skips" else kind for kind in kinds]
    kinds = [kind if isinstance(kind, str) else kind.to_dict() for kind in kinds]
    return pattern, heads, stacked(kinds, pattern, random.randint(1, 5)), random.randint(1, 200), kinds


def per_head(values):
    return str(values[0]) if len(set(values)) == 1 else f"({', '.join(map(str, values))})"


def cell_by_pairs(pattern, query, key, size):
    """What a cell of the drawn mask holds, pair by pair: nothing, the window, a sink, or kinds of heads."""
    pairs = [(q, k) for q in range(query, query + size) for k in range(key, key + size) if k <= q]
    if any(q - k < pattern.window for q, k in pairs):
        return [1]
    if pairs and key < pattern.sinks:
        return [2]
    bands = list(dict.fromkeys(pattern.skip_bands()))
    return [3 + n for n, band in enumerate(bands) if any(band.contains(q - k) for q, k in pairs)] or [0]


def expected(pattern, heads, layers, context, kinds):
    field = receptive_field(layers, context)
    holes = field.holes()
    hops = field.layers_to_cover()
    sinks = f", sinks={pattern.sinks}" if pattern.sinks else ""
    phase = f", phase={per_head(pattern.phases)}" if any(pattern.phases) else ""
    together = joint_coverage(pattern, context)
    return {
        "reach": pattern.reach,
        "pairs": [list(visible_pairs(pattern, context, head=h)) for h in range(len(pattern.periods))],
        "flops": sum(attention_flops(layer, context, heads=heads, head_dim=8) for layer in layers),
        "cache": sum(cache_tokens(layer, context) for layer in layers),
        "one cache": cache_tokens(pattern, context),
        "stack": seen_by(layers),
        "seen": [sorted(positions_of(bits)) for bits in field.seen],
        "covered": field.covered(),
        "hole": holes[0][0] if holes else -1,
        "hops": -1 if hops is None else hops,
        "keys": [list(map(sorted, pattern.keys(context - 1, context, head=h))) for h in range(len(pattern.periods))],
        "code": f"PiPattern(window={pattern.window}, period={per_head(pattern.periods)}, skips={pattern.skips}{sinks}"
        f"{phase})",
        "stretch": together.stretch,
        "lags": [
            sum(band.contains(lag) for lag in range(from_, from_ + 7))
            for band in pattern.skip_bands()
            for from_ in (0, 30)
        ],
        "cells": [cell_by_pairs(pattern, q, k, size) for size in (1, 3) for q, k in CELLS],
        "coordinated": list(coordinated_heads(1, 1, len(pattern.periods) * 2, pattern.period_of(0)).phases),
        "coprime": list(coprime_periods(pattern.period_of(0), 3)),
        "geometric": list(geometric_periods(pattern.window, pattern.window + 99, 4)),
    }


def said(base, kinds, layers):
    """What the heads of the layers see that the page's code gives."""
    names = {"PiPattern": PiPattern}
    return seen_by(stacked(eval(kinds.removeprefix("layer_patterns="), names), eval(base, names), layers))


def seen_by(layers):
    """Window, sinks and skips of each layer, those of heads that are alike once."""
    bands = [list(p.skip_bands()) if p.skips != 0 else [] for p in layers]
    return [(p.window, p.sinks, of[:1] if len(set(of)) == 1 else of) for p, of in zip(layers, bands, strict=True)]


SCRIPT = """
const inputs = JSON.parse(require("fs").readFileSync(0, "utf8"));
const of = test => [...Array(200).keys()].filter(test);
console.log(JSON.stringify(inputs.map(([p, heads, layers, context, kinds]) => {
  const stack = rules.stack(kinds, p, layers), cost = rules.costOfStack(stack, context, heads);
  const fields = rules.receptiveField(stack, context), every = p.periods.map((_, h) => h);
  return {
    reach: rules.reach(p), pairs: every.map(h => rules.pairs(p, context, h)),
    flops: 4 * 8 * cost.pairs, cache: cost.cacheTokens, "one cache": rules.cacheTokens(p, context),
    stack: [rules.code(rules.base(kinds, p)), rules.layerPatterns(kinds, p)],
    seen: fields.map(seen => of(at => seen[at] === 1)),
    covered: rules.covered(fields[layers]), hole: rules.firstHole(fields[layers]), hops: rules.layersToCover(fields),
    keys: every.map(h => [of(k => rules.seesLocal(p, context - 1, k)), of(k => rules.seesSkip(p, context - 1, k, h))]),
    code: rules.code(p), stretch: rules.stretch(p, context),
    coordinated: rules.coordinatedPhases(p.periods[0], 2 * p.periods.length),
    lags: every.flatMap(h => [0, 30].map(from => rules.lagsBetween(p, h, from, from + 7))),
    cells: [1, 3].flatMap(size => CELLS.map(([q, k]) => rules.cell(p, q, k, size))),
    coprime: rules.coprimePeriods(p.periods[0], 3),
    geometric: rules.geometricPeriods(p.window, p.window + 99, 4),
  };
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_rules_in_javascript_are_those_in_python():
    cases = [drawn(seed) for seed in range(COMPARED)]
    given = [
        [_fields(p), heads, len(layers), context, [k if isinstance(k, str) else _fields(PiPattern(**k)) for k in kinds]]
        for p, heads, layers, context, kinds in cases
    ]
    rules = re.search(r'<script id="rules">(.*?)</script>', PAGE, re.DOTALL)[1]
    done = subprocess.run(
        ["node", "-e", f"{rules}const CELLS = {json.dumps(CELLS)};{SCRIPT}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
    )
    for case, got in zip(cases, json.loads(done.stdout), strict=True):
        got["stack"] = said(*got["stack"], layers=len(case[2]))
        assert got == expected(*case), case


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


MOVE = """
<script>
const log = [];
addEventListener("error", event => log.push(event.message));
setTimeout(() => {
  const before = document.getElementById("code").textContent;
  for (const [name, value] of Object.entries(VALUES)) {
    const input = document.getElementById(name);
    input.value = value;  // of a slider, or of a list
    input.dispatchEvent(new Event("input", {bubbles: true}));
  }
  setTimeout(() => {
    const boxes = [...document.querySelectorAll("#figures b")];
    const figures = Object.fromEntries(boxes.map(b => [b.dataset.name, b.textContent]));
    const code = document.getElementById("code").textContent;
    const cells = document.getElementById("mask").width;
    document.documentElement.dataset.found = JSON.stringify({figures, code, before, cells, log});
  }, 300);
}, 100);
</script>
"""


SLIDERS = {"window": 4, "period": 48, "phase": 5, "skips": 3, "layers": 3, "sinks": 2, "context": 12}


def moved(tmp_path, patterns, values):
    """What the page says at first, and after its controls were moved."""
    page = tmp_path / "explorer.html"
    write_explorer(page, patterns, heads=4, context=5000)
    page.write_text(page.read_text().replace("</html>", MOVE.replace("VALUES", json.dumps(values)) + "</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr"]
    done = subprocess.run(
        [browser(), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert found["log"] == [] and "CONSOLE" not in done.stderr
    return found


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize("schedule", ["coprime", "coordinated"])
def test_moving_the_sliders_in_a_browser(tmp_path, schedule):
    found = moved(tmp_path, [PiPattern(100, 64, 8, phase=3)] * 4, SLIDERS | {"schedule": schedule})
    assert found["before"] == "PiPattern(window=100, period=64, skips=8, phase=3)"
    if schedule == "coprime":
        periods = coprime_periods(48, 4)
        pattern = PiPattern(16, periods, 3, sinks=2, phase=5)
        code = f"PiPattern(window=16, period={periods}, skips=3, sinks=2, phase=5)"
    else:  # the phases of coordinated heads, turned by the slider
        pattern = PiPattern(16, 48, 3, sinks=2, phase=(5, 17, 29, 41))
        code = "PiPattern(window=16, period=48, skips=3, sinks=2, phase=(5, 17, 29, 41))"
    assert found["code"] == code
    field = receptive_field([pattern] * 3, 4096)
    assert found["figures"]["seen through all layers"] == f"{100 * field.covered() / 4096:.2f} %"
    assert found["figures"]["first hole (lag)"] == f"{field.holes()[0][0]:,}"
    assert found["figures"]["decoding cache (tokens a layer)"] == f"{cache_tokens(pattern, 4096):,}"
    assert found["figures"]["lags without a hole, one layer"] == f"{joint_coverage(pattern, 4096).stretch:,}"
    drawn = pattern.reach * 5 // 4 + 2  # rows and columns of the mask: the whole reach
    assert pattern.reach < found["cells"] <= drawn + 1


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("kinds", "of_one"),
    [
        ("windows, one of six is dense", ["local"] * 3 + ["dense"] + ["local"] * 2),
        ("windows, one of six has all skips", ["local"] * 3 + ["all-skips"] + ["local"] * 2),
        ("as given", ["local", "dense"]),
    ],
)
def test_layers_of_several_kinds_in_a_browser(tmp_path, kinds, of_one):
    given = stacked(["local", "dense"], PiPattern(100, 64, 8), 4)
    found = moved(tmp_path, given, SLIDERS | {"schedule": "one", "kinds": kinds})
    assert found["before"] == 'PiPattern(window=100, period=1, skips=0)\nlayer_patterns=["pi", "dense"]'
    pattern = PiPattern(16, 48, 3, sinks=2)  # a window has one phase only, when the slider of phases is moved
    if kinds == "as given":  # the windows are the pattern of the sliders
        of_one = ["pi", "dense"]
    layers = stacked(of_one, pattern, 3)
    assert said(*found["code"].split("\n"), layers=3) == seen_by(layers)
    field, flops = receptive_field(layers, 4096), [attention_flops(p, 4096, heads=4, head_dim=8) for p in layers]
    dense = attention_flops(DENSE, 4096, heads=4, head_dim=8)
    assert found["figures"]["seen through all layers"] == f"{100 * field.covered() / 4096:.2f} %"
    assert found["figures"]["attention FLOPs, of dense"] == f"{100 * sum(flops) / (3 * dense):.2f} %"
    kept = round(sum(cache_tokens(layer, 4096) for layer in layers) / 3)
    assert found["figures"]["decoding cache (tokens a layer)"] == f"{kept:,}"


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_heads_of_their_own_stay_until_what_they_follow_is_moved(tmp_path):
    pattern = PiPattern(16, (1, 3, 9, 25), 8)
    assert moved(tmp_path, [pattern] * 4, {"layers": 5, "sinks": 2})["code"] == (
        "PiPattern(window=16, period=(1, 3, 9, 25), skips=8, sinks=2)"
    )
    assert moved(tmp_path, [pattern] * 4, {"heads": 2})["code"] == "PiPattern(window=16, period=(1, 2), skips=8)"


def started(tmp_path, patterns, heads):
    """What the page is set to."""
    write_explorer(tmp_path / "a" / "page.html", patterns, heads=heads, context=512)
    return json.loads(re.search(r"const initial = (.*);", (tmp_path / "a" / "page.html").read_text())[1])


def test_the_page_starts_at_the_given_patterns(tmp_path):
    found = started(tmp_path, [PiPattern(64, (60, 70), 8)] * 4, 2)
    assert found["periods"] == [60, 70] and found["kinds"] == ["pi"] and found["layers"] == 4
    found = started(tmp_path, [coordinated_heads(16, 64, 4)] * 4, 4)
    assert found["phases"] == [0, 1, 2, 3] and found["schedule"] == "coordinated"
    with pytest.raises(ValueError, match="causal patterns"):
        started(tmp_path, [PiPattern(64, 64, 8, causal=False)], 2)


def test_the_page_starts_at_layers_of_several_kinds(tmp_path):
    windows = PiPattern(64, 1, 0, sinks=4)
    found = started(tmp_path, [windows, DENSE, windows] * 2, 2)
    assert found["window"] == 64 and found["skips"] == 0 and found["kinds"] == ["pi", "dense", "pi"]
    pattern = PiPattern(16, 4, None, sinks=4)  # with all skips; the sliders have some of them
    found = started(tmp_path, [PiPattern(16, 1, 0, sinks=4), pattern, windows], 2)
    assert found["window"] == 16 and found["period"] == 4 and found["skips"] == 8
    assert found["kinds"][:2] == ["local", "all-skips"] and found["kinds"][2]["window"] == 64
    assert started(tmp_path, [DENSE] * 2, 2)["kinds"] == ["dense"]
    wide = PiPattern(100, 1, 0)  # as a converted model whose other layers keep their own windows
    assert started(tmp_path, [windows, wide, windows], 2)["window"] == 100
