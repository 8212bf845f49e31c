"""``pop-serve`` as a user runs it: a fitted artifact of the bundled model over HTTP, with many requests at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning import CalibrationData, PruningPlan, StageAwareGenerator, closed_form

from tests.helpers.served import ENVIRONMENT, ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

BASE = str(ROOT / "checkpoints" / "facts-gemma3")
DEPTH, ANSWER, REQUESTS = 6, 8, 30
ENGINE = {name: value for name, value in ENVIRONMENT.items() if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING",)}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    data = CalibrationData(f"{BASE}/calibration.jsonl", tokenizer, limit=64, batch_size=16)
    projections = closed_form(model, [DEPTH], data)[DEPTH]
    found = StageAwareGenerator(model, PruningPlan(DEPTH), projections, tokenizer=tokenizer)
    found.folder = tmp_path_factory.mktemp("served")
    found.save_pretrained(found.folder / "artifact", base=BASE)
    return found


def pop_serve(*words, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", "pop_lightning.cli.serve", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | ENGINE | {"VLLM_LOGGING_LEVEL": "INFO"},
        **streams,
    )


@pytest.fixture(scope="module")
def server(generator):
    """The address of a running server, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = generator.folder / "log.txt"
    with log.open("w") as file:
        process = pop_serve(
            generator.folder / "artifact", "--dtype", "float32", "--served-model-name", "demo", "--enforce-eager",
            "--max-model-len", "512", "--max-num-batched-tokens", "512", "--host", "127.0.0.1", "--port", port,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 500
            while not _is_up(address):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield address, log
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _is_up(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def counted(address):
    """Context and kept tokens that ``/metrics`` reports."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        values = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    return [int(float(values[f"pop:{kind}_tokens_total"])) for kind in ("context", "kept")]


def post(address, **body):
    """The lines of a completion's answer."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({"model": "demo", "max_tokens": ANSWER, "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read().decode().splitlines()


def streamed(address, prompt):
    lines = [line.removeprefix("data: ") for line in post(address, prompt=prompt, stream=True) if line]
    assert lines[-1] == "[DONE]"
    # vLLM keeps the space between the prompt and its answer.
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]).lstrip()


def texts(generator, prompts):
    """What ``pop-generate`` answers."""
    tokenizer = generator.tokenizer
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = generator.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        yield tokenizer.decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def test_many_streams_at_once_answer_as_pop_generate_does(generator, server):
    address, log = server
    with open(f"{BASE}/calibration.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = [row["prompt"] for row in rows[-REQUESTS:]]
    wanted = list(texts(generator, prompts))
    with ThreadPoolExecutor(REQUESTS) as pool:
        cold = list(pool.map(lambda prompt: streamed(address, prompt), prompts))
        warm = list(pool.map(lambda prompt: streamed(address, prompt), prompts))
    assert cold == wanted
    assert warm == wanted
    assert f"context tokens ran through {DEPTH} of" in log.read_text()


def test_metrics_count_context_and_kept_tokens(generator, server):
    address, _ = server
    length = 20  # less than a block: nothing of it is in the prefix cache
    before = counted(address)
    post(address, prompt=[5 + number for number in range(length)])
    context = generator.plan.context_of(length)
    assert [after - first for after, first in zip(counted(address), before, strict=True)] == [context, length - context]
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        assert "vllm:prompt_tokens_total{" in answer.read().decode()


@pytest.mark.parametrize("body", [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}])
def test_log_probabilities_of_the_prompt_are_a_bad_request(server, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server[0], prompt="the", **body)
    assert error.value.code == 400
    assert "serve the base" in error.value.read().decode()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--enable-lora",), "the pruned prefill does not work with --enable-lora"),
        (("--load-format", "dummy"), "--load-format dummy"),
        (("--runner", "pooling"), "--runner pooling"),
    ],
)
def test_pop_serve_refuses_in_one_sentence(generator, words, named):
    done = pop_serve(generator.folder / "artifact", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, said = done.communicate(timeout=500)
    assert done.returncode == 2, said[-3000:]
    assert said.splitlines()[-1].startswith("pop-serve: error: ")
    assert named in said.splitlines()[-1]
