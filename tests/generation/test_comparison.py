"""``pop-generate data --compare``: every number against a plain pass, interruptions, and the page."""

import json
import re
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.cli import generate
from pop_lightning.core import clock
from pop_lightning.core.journal import Journal
from pop_lightning.evaluation.answers import rouge_l, token_f1
from pop_lightning.evaluation.paired import paired_interval, sameness_interval
from pop_lightning.generation import batch, comparison, comparison_page
from pop_lightning.generation.batch import generate_file

from tests.helpers.browser import assert_fits
from tests.helpers.workbench import save_base, save_rows

NEW, ROWS = 4, 7
TIMES = ("ttft_ms", "full_ttft_ms", "ttft_rounds_ms", "full_ttft_rounds_ms")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = save_base(tmp_path_factory.mktemp("compare") / "base", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return StageAwareGenerator(model, PruningPlan(2), tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with references; the last one has none, and a prompt of one token, of which nothing is pruned."""
    path = save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[-1] = json.dumps({"prompt": "w5"})
    path.write_text("\n".join(lines))
    return str(path)


def compared(generator, data, output, **more):
    summary = generate_file(
        generator, data, output, max_new_tokens=NEW, batch_size=4, compare=True, **{"timed_rows": 3} | more
    )
    return summary, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(generator, data, tmp_path_factory):
    """A comparison that was not interrupted: folder, summary, records."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *compared(generator, data, folder / "out.jsonl")


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


@torch.no_grad()
def plain(generator, record):
    """One row by itself, without padding: greedy token by token, then the response's tokens one after the other."""
    tokenizer, model = generator.tokenizer, generator.model
    prompt = tokenizer(record["prompt"], return_tensors="pt").input_ids
    answers, logits = {}, {}
    for name in ("full", "pruned"):

        def prefill(name=name):
            if name == "pruned":
                return generator.prefill(prompt)
            with generator.full_model():
                return generator.prefill(prompt)

        output, ids = prefill(), []
        while len(ids) < NEW:
            ids.append(int(output.logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
                break
            output = model(input_ids=torch.tensor([[ids[-1]]]), past_key_values=output.past_key_values)
        answers[name] = ids, tokenizer.decode(ids, skip_special_tokens=True)
        if "response" in record:
            output, steps = prefill(), []
            response = [*tokenizer(record["response"]).input_ids, tokenizer.eos_token_id][:NEW]
            for token in response:
                steps.append(output.logits[0, -1].log_softmax(-1))
                output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            logits[name] = torch.stack(steps)
    if not logits:
        return answers, {}
    full, pruned = logits["full"], logits["pruned"]
    chosen = torch.tensor(response)[:, None]
    return answers, {
        "full_nll": -full.gather(1, chosen).mean().item(),
        "nll": -pruned.gather(1, chosen).mean().item(),
        "kl": (full.exp() * (full - pruned)).sum(-1).mean().item(),
        "agreement": (full.argmax(-1) == pruned.argmax(-1)).double().mean().item(),
    }


def test_every_number_of_a_row_is_that_of_a_plain_pass(generator, whole):
    _, _, records = whole
    assert [record["row"] for record in records] == list(range(ROWS))
    assert [record["origin"] for record in records] == [f"rows.jsonl line {line}" for line in range(1, ROWS + 1)]
    for record in records:
        answers, forced = plain(generator, record)
        (a, full), (b, pruned) = answers["full"], answers["pruned"]
        assert (record["full_generated"], record["generated"]) == (full, pruned)
        assert {name: record[name] for name in forced} == pytest.approx(forced, abs=1e-5)
        assert record["same_text"] == (full == pruned)
        assert record["first_token_agreement"] == (a[:1] == b[:1])
        same = 0
        while same < min(len(a), len(b)) and a[same] == b[same]:
            same += 1
        assert record["common_prefix"] == pytest.approx(same / max(len(a), len(b)))
        assert record["token_f1_to_full"] == token_f1(pruned, full)
        assert record["rouge_l_to_full"] == rouge_l(pruned, full)
        for prefix, text in (("", pruned), ("full_", full)):
            if "response" in record:
                assert record[f"{prefix}exact_match"] == (text == record["response"])
                assert record[f"{prefix}token_f1"] == token_f1(text, record["response"])
                assert record[f"{prefix}rouge_l"] == rouge_l(text, record["response"])
    assert 0 < sum(record["same_text"] for record in records) < ROWS, "some answers change, some do not"
    assert "response" not in records[-1]
    assert not {"kl", "nll", "exact_match"} & set(records[-1])


def test_the_summary_has_means_and_paired_intervals_of_the_rows_that_have_a_measure(whole):
    _, summary, records = whole
    found = summary["compared"]
    assert found["nll"]["rows"] == found["exact_match"]["rows"] == ROWS - 1
    assert found["same_text"]["rows"] == ROWS
    nll = [[record[name] for record in records[:-1]] for name in ("full_nll", "nll")]
    assert found["nll"]["difference"] == pytest.approx(sum(nll[1]) / 6 - sum(nll[0]) / 6)
    assert (found["nll"]["low"], found["nll"]["high"]) == paired_interval(*nll, rate=False)[1:3]
    same = [record["same_text"] for record in records]
    assert (found["same_text"]["low"], found["same_text"]["high"]) == sameness_interval(same)[1:3]
    assert found["same_text"]["changed"] == same.count(0.0)
    assert summary["token_f1"] == found["token_f1"]["pruned"]
    assert 0 <= found["kl"]["low"] <= found["kl"]["pruned"] <= found["kl"]["high"]


def test_times_are_medians_of_rounds_in_which_both_models_take_turns(generator, whole, monkeypatch):
    _, summary, records = whole
    timed = [record for record in records if "ttft_ms" in record]
    lengths = sorted(record["prompt_tokens"] for record in records)
    assert len(timed) == summary["compared"]["ttft"]["rows"] == 3
    assert {lengths[0], lengths[-1]} <= {record["prompt_tokens"] for record in timed}
    ratio = 1.0
    for record in timed:
        ratio *= (record["full_ttft_ms"] / record["ttft_ms"]) ** (1 / 3)
    assert summary["compared"]["ttft"]["ratio"] == pytest.approx(ratio)

    turns = []
    prefill = generator.prefill
    monkeypatch.setattr(
        generator, "prefill", lambda *args, **kw: turns.append(generator._pruning) or prefill(*args, **kw)
    )
    monkeypatch.setattr(clock.time, "perf_counter", iter(float(tick) for tick in range(1000)).__next__)
    rows, _ = batch._read_rows(generator, generator.tokenizer, str(whole[0] / "out.jsonl"), NEW, False, None)
    rounds = []
    times = comparison.ttft(generator, rows[0], 0, lambda: rounds.append(len(turns)))
    assert rounds == [2, 4, 6, 8], "after both models' turns"
    assert turns == [False, True, True, False] * 2
    assert times["ttft_ms"] == times["full_ttft_ms"] > 0
    assert len(times["ttft_rounds_ms"]) == len(times["full_ttft_rounds_ms"]) == comparison.REPEATS


def test_noisy_rounds_are_named_in_the_terminal_and_on_the_page(generator, whole):
    _, summary, records = whole

    def shown(**rounds):
        timed = [dict(record) for record in records]
        for at, record in enumerate(record for record in timed if "ttft_ms" in record):
            for name, factors in rounds.items():  # rows of different lengths differ, which is not noise
                record[f"{name}_ms"] = (at + 1) * sorted(factors)[1]
                record[f"{name}_rounds_ms"] = [(at + 1) * each for each in factors]
        compared = comparison.summary(timed)
        changed = summary | {"compared": compared}
        page = comparison_page.render_page(changed, timed, generator, {})
        return compared["ttft"], comparison_page.text(changed), unescape(page)

    times, *both = shown(full_ttft=[10, 10, 10.5], ttft=[5, 5.2, 5])
    assert not any("noisy" in each for each in both)
    assert times["full_spread"] == {"median": 1.0, "p90": pytest.approx(1.05)}
    times, *both = shown(full_ttft=[10, 10, 10.5], ttft=[5, 5, 15])
    assert times["pruned_spread"] == {"median": 1.0, "p90": pytest.approx(3.0)}
    for each in both:
        assert "The times are noisy: the pruned prefill's p90 lies 200% above its median. Treat the ratio" in each


def test_rows_of_an_older_journal_have_medians_only(whole):
    old = [{name: value for name, value in each.items() if "rounds" not in name} for each in whole[2]]
    assert comparison.summary(old)["ttft"].keys() == whole[1]["compared"]["ttft"].keys() - {
        "full_spread",
        "pruned_spread",
    }
    assert "noisy" not in comparison_page.text(whole[1] | {"compared": comparison.summary(old)})


def both_forms(summary, records, generator):
    return comparison_page.text(summary), unescape(comparison_page.render_page(summary, records, generator, {}))


def test_references_that_are_cut_are_counted_with_the_flag_that_cuts_them(generator, tmp_path):
    lines = [{"prompt": f"w{at} w2", "response": "w3 w4 w5 w6 w7" if at < 2 else "w3"} for at in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary, records = compared(generator, str(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl")
    for each in both_forms(summary, records, generator):
        assert each.count(f"2 references of the file are longer than --max_new_tokens {NEW} and compared up to") == 1
    for each in both_forms(summary | {"references_cut": 1}, records, generator):
        assert "1 reference of the file is longer than" in each
    for each in both_forms(summary | {"references_cut": 0}, records, generator):
        assert "--max_new_tokens" not in each


def test_a_share_that_is_0_for_both_models_is_not_shown_as_unchanged(generator, whole):
    _, summary, records = whole

    def shown(full, pruned):
        changed = [dict(record) for record in records]
        for record in changed[:-1]:
            record |= {"full_exact_match": full, "exact_match": 0.0, "token_f1": 0.5, "rouge_l": 0.5}
        changed[0]["exact_match"] = pruned
        new = summary | {"compared": comparison.summary(changed)}
        assert "exact_match" in new["compared"], "the figures have it"
        return both_forms(new, changed, generator)

    for each in shown(0.0, 0.0):
        assert "Not shown: exact match (0 for both models on every row, which says nothing about pruning)." in each
        assert each.count("exact match") == 1, "not in the tables, the captions or the headline"
        assert each.count("token F1") > 1
    for each in (*shown(0.0, 1.0), *shown(1.0, 0.0)):
        assert "Not shown" not in each
        assert "exact match " in each
        assert "% pruned, " in each


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_rows(generator, data, tmp_path, whole, monkeypatch):
    output, answered, answer = tmp_path / "out.jsonl", [], batch.Answers.__call__

    def counted(self, rows, timed):
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.extend(row.origin for row in rows)
        return answer(self, rows, timed)

    monkeypatch.setattr(batch.Answers, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        compared(generator, data, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial"]
    partial = tmp_path / "out.jsonl.partial"
    lines = partial.read_text().splitlines()
    assert len(lines) == 5
    assert [json.loads(line)["prompt_tokens"] for line in lines[1:]] == sorted(
        (record["prompt_tokens"] for record in whole[2]), reverse=True
    )[:4], "the longest come first"
    answered.append("one more")
    summary, records = compared(generator, data, output)
    assert len(answered) == ROWS + 1, "finished rows are not answered again"
    assert without_times(records) == without_times(whole[2])
    assert {k: v for k, v in summary["compared"].items() if k != "ttft"} == {
        k: v for k, v in whole[1]["compared"].items() if k != "ttft"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "out.jsonl"]


def test_a_batch_that_was_cut_is_answered_again(generator, data, tmp_path, whole, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch, "_answer_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compared(generator, data, output)
    monkeypatch.undo()
    with Journal(tmp_path / "out.jsonl.partial") as journal:
        journal.add([whole[2][0] | {"generated": "from a batch that was cut"}])
    assert without_times(compared(generator, data, output)[1]) == without_times(whole[2])


def test_other_arguments_are_refused_by_name_and_replaced_when_asked(generator, data, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(batch, "_answer_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compared(generator, data, output)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "w1 w2"}')
    for change, sentence in (
        ({"limit": 3}, "--limit was not given. Give those"),
        ({"sampling": {"temperature": 0.5}}, "--temperature was not given. Give those"),
        ({"timed_rows": 4}, "--timed_rows was 3. Give those"),
    ):
        with pytest.raises(InputError, match=f"was begun with other arguments: {re.escape(sentence)}"):
            compared(generator, data, output, **change)
    with pytest.raises(InputError, match="--data held other rows"):
        compared(generator, str(other), output)
    with pytest.raises(InputError, match="--compare was True"):
        generate_file(generator, data, output, max_new_tokens=NEW, batch_size=4)
    monkeypatch.undo()
    assert compared(generator, str(other), output, overwrite=True)[0]["rows"] == 1
    with Journal(tmp_path / "out.jsonl.partial"), pytest.raises(InputError, match="another process is writing to"):
        compared(generator, data, output)


def test_the_page_shows_both_answers_of_rows_that_changed(whole, tmp_path):
    folder, summary, records = whole
    page = (folder / "out.html").read_text()
    changed = [record for record in records if not record["same_text"]]
    assert page.count('<div class="answers">') == len(changed) + min(3, ROWS - len(changed))
    assert f"{len(changed)} rows: first those that lost" in page
    for record in changed:
        ours, theirs = (
            re.escape(f"{record[name].split()[-1]}</mark>" if record[name] else "<i>(empty)</i>")
            for name in ("generated", "full_generated")
        )
        assert re.search(f"full model</span>[^\\n]*{theirs}</p>\n[^\\n]*{ours}</p>", page), record
    assert f"{100 * summary['compared']['agreement']['pruned']:.2f}%" in page
    assert "<script" not in page
    assert_fits(folder / "out.html", tmp_path)


def test_the_page_escapes_what_models_and_people_wrote(generator, data, tmp_path, monkeypatch):
    monkeypatch.setattr(batch.Answers, "text", lambda self, ids: f"<script> {len(ids)} {sum(ids)}")
    compared(generator, data, tmp_path / "out.jsonl", about={"artifact": "<b>", "command": "x" * 200})
    page = (tmp_path / "out.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<dd>&lt;b&gt;</dd>" in page


def test_the_command_prints_numbers_and_writes_the_page(generator, data, tmp_path, capsys):
    generator.save_pretrained(tmp_path / "artifact")
    output = tmp_path / "out.jsonl"
    command = ["data", data, "--artifact", str(tmp_path / "artifact"), "--output", str(output), "--compare"]
    command += ["--max_new_tokens", "4", "--limit", "2", "--timed_rows", "0"]
    assert generate.main(command) == 0
    shown = capsys.readouterr()
    assert "ttft" not in json.loads(shown.out)["compared"]
    assert "common prefix" in shown.err
    assert f"page: {tmp_path / 'out.html'}" in shown.err
    assert "rows.jsonl line 1" in output.read_text()
    assert shown.err.endswith(f"figures: {tmp_path / 'out.json'}\n")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(shown.out)
    output.unlink()
    assert generate.main(command) == 2
    assert "out.html exists already; give --overwrite" in capsys.readouterr().err
    (tmp_path / "out.html").unlink()
    assert generate.main(command) == 2
    assert "out.json exists already; give --overwrite" in capsys.readouterr().err
    for name, what in (("out.html", "page"), ("out.json", "figures")):
        assert generate.main([*command[:5], str(tmp_path / name), *command[6:]]) == 2
        assert f"is the name of the {what} of --compare" in capsys.readouterr().err


def test_figures_are_not_written_over_the_rows(generator, data, tmp_path, capsys):
    generator.save_pretrained(tmp_path / "artifact")
    rows = tmp_path / "out.json"
    rows.write_text(before := Path(data).read_text())
    command = ["data", str(rows), "--artifact", str(tmp_path / "artifact"), "--output", str(tmp_path / "out.jsonl")]
    assert generate.main([*command, "--compare", "--overwrite"]) == 2
    assert f"--compare would write its figures over --data {rows}" in capsys.readouterr().err
    assert rows.read_text() == before


def test_a_terminal_has_tables_without_json_and_bars_that_reach_the_end(generator, data, tmp_path, monkeypatch, capsys):
    generator.save_pretrained(tmp_path / "artifact")
    command = ["data", data, "--artifact", str(tmp_path / "artifact"), "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command += ["--compare", "--max_new_tokens", "4", "--batch_size", "4", "--timed_rows", "3"]
    assert generate.main(command) == 0
    shown, bars = capsys.readouterr()
    assert "{" not in shown
    assert "common prefix" in shown
    assert shown.endswith(f"page: {tmp_path / 'out.html'}\nfigures: {tmp_path / 'out.json'}\n")
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == ROWS
    last = {name: re.findall(rf"{name}: .*?\]", bars)[-1] for name in ("answers", "TTFT")}
    assert "100%" in last["answers"]
    assert f"{ROWS}/{ROWS} rows" in last["answers"]
    assert f"{3 * comparison.ROUNDS}/{3 * comparison.ROUNDS} " in last["TTFT"]
