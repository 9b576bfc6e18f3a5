"""The explorer's JavaScript against the library, and the page in a browser."""

import json
import random
import re
import shutil
import subprocess
from importlib.resources import files

import pytest

from pi_attention import PiPattern
from pi_attention.accounting import attention_flops, cache_tokens, dense_flops, visible_pairs
from pi_attention.explorer import write_explorer
from pi_attention.heads import coordinated_heads, coprime_periods, geometric_periods
from pi_attention.receptive_field import joint_coverage, positions_of, receptive_field

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
    return pattern, heads, random.randint(1, 5), random.randint(1, 200)


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


def expected(pattern, heads, layers, context):
    field = receptive_field([pattern] * layers, context)
    holes = field.holes()
    hops = field.layers_to_cover()
    sinks = f", sinks={pattern.sinks}" if pattern.sinks else ""
    phase = f", phase={per_head(pattern.phases)}" if any(pattern.phases) else ""
    together = joint_coverage(pattern, context)
    return {
        "reach": pattern.reach,
        "pairs": [list(visible_pairs(pattern, context, head=h)) for h in range(len(pattern.periods))],
        "flops": attention_flops(pattern, context, heads=heads, head_dim=8),
        "dense": dense_flops(context, heads=heads, head_dim=8),
        "cache": cache_tokens(pattern, context),
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


SCRIPT = """
const inputs = JSON.parse(require("fs").readFileSync(0, "utf8"));
const of = test => [...Array(200).keys()].filter(test);
console.log(JSON.stringify(inputs.map(([p, heads, layers, context]) => {
  const fields = rules.receptiveField(p, layers, context), every = p.periods.map((_, h) => h);
  return {
    reach: rules.reach(p), pairs: every.map(h => rules.pairs(p, context, h)),
    flops: rules.flops(p, context, heads, 8), dense: rules.denseFlops(context, heads, 8),
    cache: rules.cacheTokens(p, context), seen: fields.map(seen => of(at => seen[at] === 1)),
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
        [{**p.to_dict(), "periods": list(p.periods), "phases": list(p.phases)}, heads, layers, context]
        for p, heads, layers, context in cases
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
        assert got == expected(*case), case


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


MOVE = """
<script>
const log = [];
addEventListener("error", event => log.push(event.message));
setTimeout(() => {
  const before = document.getElementById("code").textContent;
  const values = {window: 4, period: 48, phase: 5, skips: 3, layers: 3, sinks: 2, context: 12};
  for (const [name, value] of Object.entries(values)) {
    const input = document.getElementById(name);
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
  }
  document.getElementById("schedule").value = "SCHEDULE";
  document.getElementById("schedule").dispatchEvent(new Event("input", {bubbles: true}));
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


def moved(tmp_path, schedule):
    """What the page says at first, and after its sliders and its schedule were moved."""
    page = tmp_path / "explorer.html"
    write_explorer(page, PiPattern(100, 64, 8, phase=3), heads=4, layers=4, context=5000)
    page.write_text(page.read_text().replace("</html>", MOVE.replace("SCHEDULE", schedule) + "</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr"]
    done = subprocess.run(
        [browser(), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert found["log"] == [] and "CONSOLE" not in done.stderr
    assert found["before"] == "PiPattern(window=100, period=64, skips=8, phase=3)"
    return found


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize("schedule", ["coprime", "coordinated"])
def test_moving_the_sliders_in_a_browser(tmp_path, schedule):
    found = moved(tmp_path, schedule)
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
    assert found["figures"]["decoding cache (tokens)"] == f"{cache_tokens(pattern, 4096):,}"
    assert found["figures"]["lags without a hole, one layer"] == f"{joint_coverage(pattern, 4096).stretch:,}"
    drawn = pattern.reach * 5 // 4 + 2  # rows and columns of the mask: the whole reach
    assert pattern.reach < found["cells"] <= drawn + 1


def test_the_page_starts_at_the_given_pattern(tmp_path):
    write_explorer(tmp_path / "a" / "page.html", PiPattern(64, (60, 70), 8), heads=2, layers=4, context=512)
    assert '"periods": [60, 70]' in (tmp_path / "a" / "page.html").read_text()
    write_explorer(tmp_path / "page.html", coordinated_heads(16, 64, 4), heads=4, layers=4, context=512)
    page = (tmp_path / "page.html").read_text()
    assert '"phases": [0, 1, 2, 3]' in page and '"schedule": "coordinated"' in page
    with pytest.raises(ValueError, match="causal patterns"):
        write_explorer(tmp_path / "page.html", PiPattern(64, 64, 8, causal=False), heads=2, layers=4, context=512)
