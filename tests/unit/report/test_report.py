"""The HTML report: its text, and what a real browser makes of it without a network."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest

from kvsim.errors import MissingExtraError
from kvsim.report import render, write_report
from kvsim.report.tune_words import sentences
from kvsim.tuner import costs, tune
from kvtraces import Chat, Poisson, generate

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def result():
    log = generate(Chat(requests=400, seed=3, arrivals=Poisson(sessions_per_s=0.5)))
    return tune(log, costs(model="qwen3-8b", gpu="h100"), chunk_sizes=[64, 256], policies=["lru", "arc"], l1_points=6)


@pytest.fixture(scope="module")
def page(result):
    pytest.importorskip("plotly")
    return render(result, title="</script><b>log</b>.jsonl")


def test_the_recommendation_comes_first_in_plain_words(page, result):
    headline = re.search(r'<p class="headline">(.*?)</p>', page).group(1)
    assert f"Chunks of {result.point.chunk_tokens:,} tokens" in headline
    assert f"policy {result.point.policy}" in headline
    assert page.index("headline") < page.index("<h2>Plots")
    assert f"{100 * result.point.cold.token_hit_ratio:.1f}% of all prompt tokens" in page


def test_the_engines_own_cache_is_held_against_l1(result):
    """L0 of as many tokens as L1 has, of fewer, and of as many as all prompts take."""
    point, whole = result.point, result.unbounded_finest
    in_l1 = point.capacity_chunks * point.chunk_tokens
    everything = result.costs.kv.capacity_chunks(whole.l1_size_gb, whole.chunk_tokens) * whole.chunk_tokens
    for tokens, words in (
        (in_l1, f"no less than this L1 ({in_l1:,})"),
        (in_l1 - 16, f", less than this L1 ({in_l1:,})"),
        (everything, f"as much as all prompts of the log take ({everything:,})"),
    ):
        engine = dataclasses.replace(result.engine, l0_gb=(tokens + 8) * 147_456 / 2**30)
        assert engine.l0_tokens == tokens
        (said,) = [one for one in sentences(dataclasses.replace(result, engine=engine)) if "own cache is not in" in one]
        assert f"({tokens:,} tokens), " in said
        assert words in said
        assert "--simulate 8 says what L1 adds" in said


def test_coarse_chunks_that_hit_more_are_said_to_gain(result):
    point = dataclasses.replace(result.point, chunk_tokens=256)
    choice = dataclasses.replace(result.choice, point=point)
    for here, words in (
        (-0.0184, "it gains 1.84 points of hit ratio at this size, and loses 0.52 without end"),
        (0.0072, "it loses 0.72 points of hit ratio at this size, 0.52 without end"),
        (-0.00001, "it loses 0.00 points of hit ratio"),
    ):
        alignment = dataclasses.replace(result.alignment, lost_ratio_here=here, lost_ratio=0.0052)
        told = sentences(dataclasses.replace(result, alignment=alignment, choice=choice))
        assert words in told[-1]


def test_nothing_is_fetched(page):
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=", markup)
    assert "url(" not in markup
    assert "<script src" not in page


def test_what_the_user_wrote_stays_text(page):
    assert "<b>log</b>" not in page
    assert "&lt;b&gt;log&lt;/b&gt;" in page


def test_the_data_is_inside(page, result):
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL).group(1)
    assert json.loads(data) == json.loads(json.dumps(result.to_dict()))


def test_the_table_has_a_row_a_size_and_marks_one(page, result):
    table = re.search(r"The best setting at each L1 size</h2>(.*?)</table>", page, flags=re.DOTALL).group(1)
    assert table.count("<tr") == 1 + len(result.choice.frontier)
    assert table.count('class="marked"') == 1


def test_written_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(result, path, title="log")
    before = path.read_text()
    assert before.endswith("</html>\n")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_report(result, path, title="another")
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_without_plotly_the_extra_is_named(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"kvcore\[report\]"):
        render(result, title="log")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_draws_every_plot_without_a_network(page, result, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page)
    drawn = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    body = drawn[drawn.index("<body") :]
    body = re.sub(r"<script.*?</script>", "", body, flags=re.DOTALL)
    plots = re.split(r'<div class="plot[^"]*" id="', body)[1:]
    assert [plot.split('"', 1)[0] for plot in plots] == ["hit_ratio", "ttft_cdf", "marginal_gain", "policies"]
    traces = [plot.count('<g class="trace scatter') for plot in plots]
    assert traces == [3, 2, 2, 2]  # two chunk sizes and the knee; with and without; one gain and the knee; two policies
    points = plots[0].count('class="point"')
    assert points == 2 * len(result.choice.frontier) + 1  # every setting of the policy, and the knee
    assert "recommended: " in plots[0]
