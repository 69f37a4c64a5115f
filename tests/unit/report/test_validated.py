"""The report of a validation: its text, and what a real browser makes of it without a network."""

import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest

import kvsim
from kvsim.report.validation_page import render_validation
from kvsim.report.validation_words import cdf, headline, sentences, where
from kvtraces import Chat, Poisson, generate

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def found():
    """A validation of a log whose prefill took half a second more than is predicted, for long prompts only."""
    log = generate(Chat(requests=300, seed=21, block_tokens=16, arrivals=Poisson(sessions_per_s=0.8)))
    profile = kvsim.costs(model="qwen3-8b", gpu="h100").run_profile
    settings = kvsim.RunSettings(profile=profile, chunk_tokens=64, l0_gb=6.0, l1_gb=30.0)
    columns = kvsim.run(log, settings, baseline=False).columns
    slow = np.where(log.input_tokens > np.median(log.input_tokens), 0.5, 0.0)
    extra = {
        "ttft_ms": 1e3 * (columns["ttft_s"] + slow),
        "queue_ms": 1e3 * (columns["handling_s"] + columns["queue_s"]),
        "prefill_ms": 1e3 * (columns["prefill_s"] + slow),
        "matched_l1": columns["matched_l1"].astype(np.float64),
    }
    return kvsim.validate(dataclasses.replace(log, extra={**log.extra, **extra}), settings)


def test_the_words_say_how_far_off_where_and_why(found):
    assert re.search(r"p95 [\d.]+% below what was recorded", headline(found)) or "p95 is predicted" in headline(found)
    assert f"{100 * abs(found.ttft['p95'].error):.1f}% below" in headline(found)
    worst = where(found)
    assert "too short, mostly in prefill" in worst
    low = int(re.search(r"for prompts of ([\d,]+)", worst).group(1).replace(",", ""))
    assert low > np.median(found.result.columns["prompt_tokens"]) * 0.9
    assert any("baseline" in sentence for sentence in sentences(found))


def test_the_chart_has_the_three_distributions(found):
    lines = {one.name: one for one in cdf(found).series}
    assert set(lines) == {"recorded", "predicted", "mean by prompt length"}
    assert (lines["recorded"].x >= lines["predicted"].x - 1e-9).all()
    assert lines["recorded"].y[-1] == 1


def test_the_page_holds_every_table_and_escapes_its_title(found):
    pytest.importorskip("plotly")
    page = render_validation(found, title="<b>log</b>")
    assert "<b>log</b>" not in page
    for heading in ("Time to first token", "Tokens hit", "Where the error lies", "The requests furthest off"):
        assert f"<h2>{heading}</h2>" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=", markup)
    assert "does not record l0_tokens, matched_l2, loaded_tokens" in markup


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_draws_the_plot(found, tmp_path):
    pytest.importorskip("plotly")
    path = tmp_path / "report.html"
    path.write_text(render_validation(found, title="log"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000")
    nowhere = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}")
    command = [BROWSER, *flags, *nowhere, "--dump-dom", path.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.sub(r"<script.*?</script>", "", drawn[drawn.index("<body") :], flags=re.DOTALL)
    assert body.count('<g class="trace scatter') == 3
