"""Engines, each in a process of its own: reads names of folders, runs the ``job.json`` of each, writes ``found.json``.

vLLM is imported once, and each engine is a fork of the process that did so. After each job its exit code is printed.

A job has ``artifact`` (absent: the plain base), ``engine`` (arguments of vLLM), and ``phases``: lists of prompts, each
run together (``together``) or one after the other, with ``new_tokens``. ``mutation`` names a defect of
``tests/serving/mutations.py`` to put in, ``without`` a private name of vLLM to take away first.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    os.environ.update(job.get("environment", {}))
    from tests.serving import mutations

    if "probe" in job:
        write(folder, {"sentences": mutations.probe_without_each()})
        return
    if "mutation" in job:
        getattr(mutations, job["mutation"])()
    if "without" in job:
        mutations.take_away(job["without"])
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    from pop_lightning.serving import engine_args

    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_model_len": 512,
        "block_size": 32,
    } | job.get("engine", {})
    base = job.get("base")
    arguments = engine_args(job["artifact"], base, **options) if "artifact" in job else {"model": base, **options}
    llm = LLM(**arguments)
    answers = []
    for phase in job["phases"]:
        sampling = SamplingParams(
            temperature=0, max_tokens=phase["new_tokens"], ignore_eos=True, logprobs=0, detokenize=False,
            **phase.get("sampling", {}),
        )  # fmt: skip
        prompts = [{"prompt_token_ids": each} for each in phase["prompts"]]
        together = phase.get("together", True)
        outputs = []
        if "beams" in phase:
            llm.beam_search(prompts, BeamSearchParams(beam_width=phase["beams"], max_tokens=phase["new_tokens"]))
        for batch in [prompts] if together else [[each] for each in prompts]:
            outputs += llm.generate(batch, sampling, use_tqdm=False)
        answers.append([_answer(output.outputs[0]) for output in outputs])
    write(folder, {"answers": answers, "counts": llm.collective_rpc(counts), "metrics": _metrics(llm)})


def write(folder: Path, found: dict) -> None:
    (folder / "partial.json").write_text(json.dumps(found))
    (folder / "partial.json").rename(folder / "found.json")


def counts(worker) -> list[int] | None:
    """Context and kept tokens of one worker's steps with context; None for a plain model."""
    report = getattr(worker.model_runner.get_model(), "report", None)
    return None if report is None else [report.context, report.kept]


def _answer(output) -> dict:
    tokens = list(output.token_ids)
    logprobs = [each[token].logprob for each, token in zip(output.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


def _metrics(llm) -> dict[str, float]:
    wanted = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:spec_decode_num_accepted_tokens")
    return {each.name: each.value for each in llm.get_metrics() if each.name in wanted}


def serve() -> None:
    import vllm.entrypoints.llm  # noqa: F401 the seconds that every engine would take otherwise

    for line in sys.stdin:
        folder = Path(line.strip())
        child = os.fork()
        if child == 0:
            with (folder / "log.txt").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = 1
            try:
                main(folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
