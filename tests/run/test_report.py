"""The report is one whole, escaped, self-contained file that shows the figures it was given."""

import base64
import copy
import math
import re
from html.parser import HTMLParser

import pytest

from pop_lightning.core.numbers import number, percent
from pop_lightning.core.tables import joined
from pop_lightning.run import report
from pop_lightning.run.report import advice, amount, headline, summary, write_report

from tests.helpers.browser import assert_fits

IMPORTANCE = {
    "layers": 12,
    "rows": 64,
    "seed": 0,
    "prefill": [5e-6 * 0.45**layer for layer in range(11)] + [0.0],
    "decode": [3e-6, 1e-6, 8e-7, 9e-7, 6e-7, 8e-7, 1e-6, 9e-7, 2e-6, 4e-6, 5e-6, 7e-6],
}


def curve_row(depth, projection, loss, **more):
    return {
        "depth": depth,
        "projection": projection,
        "kl": loss * 1.7,
        "agreement": 1 - loss,
        "nll_increase": loss * 0.8,
        "exact_match": 1 - 3 * loss if loss < 0.3 else 0.0,
        "loss": loss,
        "bound": min(1.0, loss + 0.008),
        "rows": 400,
        **more,
    }


METRICS = {
    "format": 1,
    "depth": 8,
    "layers": 12,
    "boundary": 1,
    "projection": "closed_form",
    "budget": {"metric": "agreement", "max_drop": 0.01, "confidence": 0.95, "min_pruned": 2},
    "rows": {"fit": 512, "tune": 128, "search": 400, "verify": 332, "unusable": {"longer than the context": 7}},
    "smallest_certifiable_drop": 0.00898,
    "verified": {"metric": "agreement", "value": 0.00123, "bound": 0.00946, "rows": 332, "confidence": 0.95},
    "verification": [
        {
            "depth": depth,
            "value": value,
            "bound": bound,
            "rows": 332,
            "prompts": 332,
            "passed": passed,
            "projection": kind,
        }
        for depth, value, bound, passed, kind in (
            (10, 0.0, 0.00898, True, "closed_form"),
            (8, 0.00123, 0.00946, True, "closed_form"),
            (6, 0.0271, 0.0412, False, "lora"),
        )
    ],
    "boundaries": [
        curve_row(8, "closed_form", loss, boundary=k, speedup=speedup)
        for k, loss, speedup in ((1, 0.0011, 1.45), (4, 0.0009, 1.447), (16, 0.0004, 1.43), (64, 0.0, 1.37))
    ],
    "curve": [
        curve_row(depth, kind, loss, **({"ridge": 0.1} if kind == "closed_form" else {}))
        for kind, losses in {
            "reuse": {11: 0.0, 10: 0.0004, 8: 0.0061, 6: 0.09, 4: 0.38, 2: 0.85},
            "closed_form": {11: 0.0, 10: 0.0, 8: 0.0011, 6: 0.0183, 4: 0.062, 2: 0.27},
        }.items()
        for depth, loss in losses.items()
    ],
    "decisions": ["Ridge 0.1 won on the tune rows at depth 8.", "Depth 6 failed on the verify rows."],
    "comparison": [
        {"name": "full", "what": "The unpruned model.", "depth": 12, "exact_match": 0.998, "agreement": 1.0, "kl": 0.0},
        {
            "name": "pruned",
            "what": "The artifact.",
            "depth": 8,
            "exact_match": 0.991,
            "agreement": 0.9989,
            "kl": 0.0019,
        },
        {
            "name": "layers removed",
            "what": "The same layers left out in prefill and decode: what pruning costs without the stage split.",
            "depth": 8,
            "exact_match": 0.321,
            "agreement": 0.471,
            "kl": 3.02,
        },
    ],
    "arithmetic": {
        "depth": 8,
        "prompt_tokens": 1024,
        "full_flops": 2.9e12,
        "pruned_flops": 2.0e12,
        "saved": 0.9e12,
        "ratio": 1.45,
    },
    "ttft": {
        "prompt_tokens": 1024,
        "batch": 1,
        "full_ms": 412.0,
        "pruned_ms": 291.0,
        "full_p90_ms": 440.0,
        "pruned_p90_ms": 310.0,
        "ratio": 1.416,
        "repeats": 20,
        "device": "cpu (2 threads)",
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "device": "cpu",
}


@pytest.fixture
def metrics():
    return copy.deepcopy(METRICS)


def pictures(page: str) -> str:
    """The plots of a page, as SVG."""
    return "".join(base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]+)", page))


def written(metrics, folder, importance=IMPORTANCE):
    write_report(metrics, importance, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def drawn(page):
    """The SVG files inside the page, as one text."""
    return "".join(base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]+)", page))


def nothing_qualified(metrics):
    last = metrics["verification"][-1] | {"depth": 10, "projection": "closed_form"}
    return metrics | {"depth": None, "verified": None, "verification": [last], "arithmetic": None, "ttft": None}


class Outline(HTMLParser):
    """Checks that every tag is closed in order; keeps links, ids, and the attributes of the tag before each table."""

    VOID = ("meta", "br", "img", "source")

    def __init__(self, page):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.around_tables = [], [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "table":
            self.around_tables.append(self.last)
        self.last = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(metrics, tmp_path):
    page = written(metrics, tmp_path)
    outline = Outline(page)
    assert outline.tags.count("picture") == 2
    assert not {"script", "link", "iframe"} & set(outline.tags)
    assert len(outline.ids) == len(set(outline.ids))
    assert len(outline.links) == len(set(outline.links)) == 4, "each plot has a light and a dark drawing"
    assert all(link.startswith("data:image/svg+xml;base64,") for link in outline.links)
    assert not re.search(r"url\(|@import", page)
    assert page.count("prefers-color-scheme: dark") == 3


def test_wide_tables_scroll_in_their_own_container(metrics, tmp_path):
    outline = Outline(written(metrics, tmp_path))
    assert len(outline.around_tables) == outline.tags.count("table") > 4
    assert all(around == {"class": "scroll", "tabindex": "0"} for around in outline.around_tables)


def test_page_fits_on_a_phone_and_on_a_laptop(metrics, tmp_path):
    written(metrics, tmp_path)
    assert_fits(tmp_path / "report.html", tmp_path)


def test_page_names_what_was_run_and_shows_answers_side_by_side(metrics, tmp_path):
    answer = {
        "origin": "rows.jsonl line 7",
        "outcome": "lost",
        "prompt": "Who <b>?",
        "reference": "Ann Bee",
        "common": "Ann ",
        "full": "Bee",
        "pruned": "Sea",
        "prefix": 0.5,
    }
    same = answer | {"outcome": "same", "common": "Ann Bee", "full": "", "pruned": ""}
    metrics["examples"] = {"compared": 16, "new_tokens": 32, "most": [answer], "least": [same]}
    metrics["about"] = {"model": "some/base (Llama, 12 layers)", "command": "pop-fit --recipe x"}
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    page = written(metrics, tmp_path)
    Outline(page)
    assert "full model</span>Ann <mark>Bee</mark>" in page
    assert "pruned</span>Ann <mark>Sea</mark>" in page
    assert "pruned</span>Ann Bee</p>" in page
    assert "Who &lt;b&gt;?" in page
    for name, value in {**metrics["about"], "device": "cpu"}.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "<pre>seed: 0" in page


def test_page_shows_the_figures_it_was_given(metrics, tmp_path):
    page = written(metrics, tmp_path)
    for text in (
        "Context tokens run through 8 of 12 layers: the loss of agreement is 0.12%",
        "and at most 1.00% with 95% confidence",
        "332 verify rows; 0.95% if no other depth had been tested",
        "2.9 TFLOP",
        "31.03% less",
        "412 ms (p90 440 ms)",
        "291 ms (p90 310 ms)",
        "at depth 8, and the speedup counted at",
        "1.43x",
        "1.42x as fast",
        "cpu (2 threads)",
        "4.12%",
        "Ridge 0.1 won on the tune rows",
        "longer than the context",
        "torch 2.13.0, transformers 5.23.0",
        "layers removed",
        "what pruning costs without the stage split",
        "32.10%",
        "exactly 0",
        "budget 1.00%",
        "closed_form",
        "reuse",
        "0.90%",
    ):
        assert text in page + drawn(page), text
    assert page.count("passed</span>") == 2
    assert page.count("failed</span>") == 1


def test_salient_tokens_are_a_column_and_a_frontier_only_where_some_plan_has_them(metrics, tmp_path):
    def plan(depth, loss, speedup, **kept):
        return {"depth": depth, "projection": "closed_form", "loss": loss, "kl": loss, "speedup": speedup} | kept

    metrics["plans"] = [plan(8, 0.001, 1.45, boundary=1), plan(6, 0.02, 1.8, boundary=1)]
    for shown in (written(metrics, tmp_path), joined(summary(metrics))):
        assert "salient" not in shown
        assert "Frontier" not in shown
    selected = {"boundary": 1, "salient": 0.1, "selector": "attention"}
    metrics["plans"].append(plan(6, 0.001, 1.7, **selected))
    metrics["boundaries"].append(metrics["boundaries"][0] | selected)
    page = written(metrics, tmp_path)
    assert "<th>salient</th>" in page
    assert "Frontier" in page
    assert "salient" in joined(summary(metrics))
    assert "exported" in pictures(page)
    metrics |= {"boundary": 99}  # a plan that was not measured without training
    assert "exported" not in pictures(written(metrics, tmp_path))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"boundary": 16}, "8 of 12 layers, the last 16 prompt tokens through all: the"),
        (
            {"boundary": 0.05, "salient": 4},
            "8 of 12 layers, except for 4 prompt tokens selected among them, the last 5% of the prompt through all",
        ),
    ],
)
def test_the_result_says_which_tokens_run_in_full(metrics, kept, said):
    assert said in headline(metrics | kept)


def test_page_says_that_nothing_qualified_and_what_to_change(metrics, tmp_path):
    metrics = nothing_qualified(metrics) | {"smallest_certifiable_drop": 0.0295}
    metrics["rows"]["verify"] = 100
    page = written(metrics, tmp_path)
    Outline(page)
    assert "No depth qualified: none that prunes at least 2 layers of 12" in page
    assert "nothing was exported" in page
    assert "cannot certify a drop below 2.95%; provide at least 349 verify rows with different prompts" in page
    assert "pruned in prefill" not in page
    assert "tr.chosen" in page
    assert 'class="chosen"' not in page


def test_savings_of_a_depth_that_was_not_chosen_are_not_shown_as_saved(metrics, tmp_path):
    page = written(nothing_qualified(metrics) | {key: METRICS[key] for key in ("arithmetic", "ttft")}, tmp_path)
    Outline(page)
    assert "What pruning would save" in page
    assert "Accuracy and savings" not in page
    assert "No depth was chosen." in page


def test_a_requested_speedup_is_the_headline_and_the_loss_is_not_limited(metrics, tmp_path):
    metrics["budget"]["speedup"] = 1.4
    metrics["verification"] = [metrics["verification"][1] | {"passed": None}]
    metrics["verified"] |= {"max_drop": None, "rows": 332, "prompts": 166}
    sentence = headline(metrics)
    assert sentence.startswith(
        "1.45x counted at 1,024 prompt tokens (1.40x requested): context tokens run through 8 of 12"
    )
    assert (
        "the loss of agreement is 0.12%, and at most 0.95% with 95% confidence (332 verify rows of 166 prompts)"
        in sentence
    )
    assert "budget" not in sentence
    assert advice(metrics | {"smallest_certifiable_drop": 0.5}) == ""
    page = written(metrics, tmp_path)
    Outline(page)
    assert "Target: a counted prefill speedup of 1.40x" in page
    assert "budget 1.00%" not in page
    assert "measured</span></td>" in page
    assert "measured" in joined(summary(metrics))


def test_noisy_times_carry_a_warning(metrics, tmp_path):
    assert "noisy" not in written(metrics, tmp_path)
    metrics["ttft"]["pruned_p90_ms"] = 500.0
    assert "the pruned prefill&#39;s p90 lies 72% above its median" in written(metrics, tmp_path)


def test_the_caption_claims_a_zero_only_where_there_is_one(metrics, tmp_path):
    assert "is exactly 0" in written(metrics, tmp_path)
    assert "is exactly 0" not in written(metrics, tmp_path, importance=IMPORTANCE | {"prefill": IMPORTANCE["decode"]})


def test_strings_are_escaped_in_the_page_and_in_its_plots(metrics, tmp_path):
    bad = "<script>alert('&')</script> $x$"
    metrics["decisions"].append(bad)
    metrics["comparison"][0]["what"] = bad
    metrics["rows"]["unusable"] = {bad: 1}
    metrics["device"] = bad
    metrics["curve"].append(curve_row(7, bad, 0.01))
    page = written(metrics, tmp_path)
    assert "<script" not in page + drawn(page)
    assert "&lt;script&gt;" in drawn(page)
    assert page.count("&lt;script&gt;") >= 4
    Outline(page)


@pytest.mark.parametrize("metric", ["nll_increase", "exact_match"])
def test_other_metrics_show_their_own_unit(metrics, tmp_path, metric):
    metrics["budget"]["metric"] = metrics["verified"]["metric"] = metric
    metrics["curve"][0]["loss"] = -0.002  # pruning may help the NLL by chance
    metrics["curve"][1]["bound"] = math.inf
    page = written(metrics, tmp_path)
    assert ("0.00946 nats" in page) == (metric == "nll_increase")


def test_optional_parts_may_be_missing(metrics, tmp_path):
    for key in ("arithmetic", "ttft", "comparison", "verified", "verification", "boundaries", "decisions", "versions",
                "device"):  # fmt: skip
        metrics[key] = None
    metrics["curve"] = [curve_row(8, "reuse", 0.0, bound=None)]
    Outline(written(metrics, tmp_path))
    Outline(written(metrics | {"curve": []}, tmp_path, importance={}))
    Outline(written(metrics, tmp_path, importance=IMPORTANCE | {"prefill": [0.0] * 12, "decode": [0.0] * 12}))
    assert "no verify split was opened" in headline(metrics)


def test_an_interrupted_report_leaves_the_old_one_and_nothing_else(metrics, tmp_path, monkeypatch):
    before = written(metrics, tmp_path)

    def broken(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(report.Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(nothing_qualified(metrics), IMPORTANCE, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_terminal_table_holds_curve_comparison_and_choice(metrics):
    lines = joined(summary(metrics)).splitlines()
    columns = ["depth", "projection", "KL", "agreement", "NLL", "increase", "loss", "bound"]
    assert lines[0].split() == ["search", "rows:", *columns]
    assert [line.split()[:2] for line in lines[2:4]] == [["11", "closed_form"], ["11", "reuse"]]
    assert next(line for line in lines if line.split()[:2] == ["8", "closed_form"]).split()[2:] == [
        "0.00187", "99.89%", "0.00088", "0.11%", "0.91%",
    ]  # fmt: skip
    assert any(line.split() == ["8", "closed_form", "0.12%", "0.95%", "passed"] for line in lines)
    assert any(line.split() == ["6", "lora", "2.71%", "4.12%", "failed"] for line in lines)
    assert any(line.split()[:1] == ["16"] and line.endswith("1.43x") for line in lines)
    assert any(line.startswith("layers removed") and "32.10%" in line for line in lines)
    assert lines[-1].startswith("Context tokens run through 8 of 12 layers")
    assert joined(summary(nothing_qualified(metrics))).splitlines()[-1].startswith("No depth qualified")


def test_the_terminal_has_the_measured_speedup_next_to_the_counted_one(metrics):
    start = "Prefill of 1,024 prompt tokens at depth 8: 1.45x counted in operations"
    assert f"{start}, 1.42x measured (412 ms to 291 ms, cpu (2 threads)).\n" in joined(summary(metrics))
    metrics["ttft"]["pruned_p90_ms"] = 500.0
    assert "(2 threads)). The times are noisy" in joined(summary(metrics))
    metrics["ttft"] = None
    assert f"{start}; not timed.\n" in joined(summary(metrics))


def test_a_bound_of_clipped_losses_says_so(metrics, tmp_path):
    metrics["budget"]["metric"] = "nll_increase"
    metrics["verified"] |= {"metric": "nll_increase", "cap": 1.0, "clipped": 0.02}
    clipped = "where the loss of a prompt counts as 1 nats at most (2.00% lost more)"
    assert clipped in headline(metrics)
    assert clipped in written(metrics, tmp_path)
    metrics["verified"]["metric"] = "agreement"
    assert "at most (" not in headline(metrics)


def test_numbers_neither_hide_a_small_loss_nor_invent_one():
    assert [percent(value) for value in (0, 1, 0.5, 1e-6, 0.999999, None, math.inf)] == [
        "0.00%", "100.00%", "50.00%", "0.0001%", ">99.99%", "–", "∞",
    ]  # fmt: skip
    assert [number(value) for value in (0, 3.02, 0.0019, 1.234e-6, math.nan)] == [
        "0",
        "3.02",
        "0.0019",
        "1.23e-06",
        "–",
    ]
    assert amount(0.25, "nll_increase") == "0.25 nats"


def test_advice_is_given_only_where_rows_are_too_few(metrics):
    assert advice(metrics) == ""
    assert advice(metrics | {"smallest_certifiable_drop": None}) == ""
    metrics["budget"]["max_drop"] = 0.0
    assert "raise budget.max_drop" in advice(metrics)


def test_a_depth_that_failed_by_its_bound_only_is_named_with_what_to_do(metrics):
    near = {"depth": 10, "value": 0.004, "bound": 0.01304, "rows": 332, "passed": False, "needed": 611}
    sentence = advice(metrics | {"depth": None, "verification": [near]})
    assert "Depth 10 lost 0.40%" in sentence
    assert "332 rows" in sentence
    assert "1.30%" in sentence
    advised = (
        "provide about 620 verify rows with different prompts, 2,600 rows in all, or raise budget.max_drop to 0.0131"
    )
    assert advised in sentence
    older = advice(metrics | {"depth": None, "verification": [near | {"needed": None, "bound": 1.0}]})
    assert "provide more rows, or raise budget.max_drop." in older
    assert older.endswith("only a run on new rows certifies the result at the stated confidence.")
    assert advice(metrics | {"depth": None, "verification": [near | {"value": 0.02}]}) == ""
