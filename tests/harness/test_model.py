"""The ``pop`` model of lm-eval: both stages in every kind of request, and lm-eval's own numbers at full depth."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.core.errors import InputError
from pop_lightning.harness.model import PopLM
from pop_lightning.models.loading import load_model, load_tokenizer

from tests.helpers import vision
from tests.helpers.families import build, marked, two_pass
from tests.helpers.workbench import WORDS, save_base, save_tokenizer

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


@pytest.fixture(
    scope="module", params=marked(("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "cohere2"), ("llama",))
)
def base(request, tmp_path_factory):
    folder = save_base(tmp_path_factory.mktemp("base"), request.param)
    save_tokenizer(folder, CHAT)
    return folder


def generator(base, depth=2, boundary=1, **plan):
    return StageAwareGenerator(
        load_model(str(base)), PruningPlan(depth, boundary, **plan), tokenizer=load_tokenizer(str(base))
    )


def text(words, seed):
    return " ".join(random.Random(seed).choices(WORDS[4:], k=words))


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i, task_name="t") for i, each in enumerate(arguments)
    ]


def choices():
    """Contexts of different lengths, each with continuations of one token, of several, and with a common start."""
    pairs = []
    for seed, words in enumerate((3, 17, 9)):
        context, start = text(words, seed), text(3, 10 + seed)
        pairs += [
            (context, f" {start} {WORDS[5]}"),
            (context, f" {start} {WORDS[6]}"),
            (context, f" {WORDS[7 + seed]}"),
        ]
        pairs += [(context, f" {text(6, 20 + seed)}")]
    return pairs


@pytest.fixture
def prefilled_rows(monkeypatch):
    """Counts the rows of every prefill."""
    rows, plain = [], StageAwareGenerator.prefill

    def prefill(self, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return plain(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(StageAwareGenerator, "prefill", prefill)
    return rows


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("boundary", [1, 3])
def test_at_full_depth_choices_have_the_numbers_of_the_hf_model(base, batch, boundary):
    ours = generator(base, depth=4, boundary=boundary)
    reference = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(str(base)), batch_size=3)
    expected = reference.loglikelihood(requests("loglikelihood", choices()), disable_tqdm=True)
    found = PopLM(generator=ours, batch_size=batch).loglikelihood(requests("loglikelihood", choices()), True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([total for total, _ in found]), torch.tensor([total for total, _ in expected]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("plan", [{"depth": 2}, {"depth": 1, "boundary": 3}, {"depth": 2, "boundary": 0}])
def test_choices_are_scored_after_a_pruned_prompt_and_in_full(base, plan):
    lm = PopLM(generator=generator(base, **plan), batch_size=2)
    model, differences = lm.generator.model, []
    for (context, continuation), (total, greedy) in zip(
        choices(), lm.loglikelihood(requests("loglikelihood", choices()), True), strict=True
    ):
        ids = torch.tensor([lm.tok_encode(context)])
        tokens = lm.tok_encode(context + continuation)[ids.shape[1] :]
        logits, cache = two_pass(model, ids, torch.ones_like(ids), plan["depth"], plan.get("boundary", 1))
        expected, best = 0.0, True
        for token in tokens:  # the slow way: one decode step per token of the continuation
            steps = logits[0, -1].log_softmax(-1)
            expected, best = expected + steps[token].item(), best and int(steps.argmax()) == token
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == best
        whole = torch.cat([ids, torch.tensor([tokens])], -1)
        steps = model(whole).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
        differences.append(abs(total - steps.gather(-1, torch.tensor(tokens)[:, None]).sum().item()))
    assert max(differences) > 1e-2  # the prompt was pruned


def test_every_context_is_prefilled_once(base, prefilled_rows):
    PopLM(generator=generator(base), batch_size=2).loglikelihood(requests("loglikelihood", choices()), True)
    assert prefilled_rows == [2, 1]


@pytest.mark.parametrize("depth", [4, 2])
def test_a_text_without_a_prompt_is_scored_by_the_full_model(base, depth):
    ours = generator(base, depth)
    reference = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(str(base)), max_length=16)
    texts = [(text(40, 1),), (text(7, 2),)]
    expected = reference.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    found = PopLM(generator=ours, max_length=16).loglikelihood_rolling(requests("loglikelihood_rolling", texts), True)
    assert found == pytest.approx(expected, abs=1e-4)


def test_lm_evals_own_class_measures_answers_of_the_generator_and_refuses_log_likelihoods(base):
    ours = generator(base)
    given = HFLM(pretrained=ours, tokenizer=load_tokenizer(str(base)), batch_size=2)
    prompts = [(text(words, seed), {"until": [], "max_gen_toks": 9}) for seed, words in enumerate((12, 5, 8))]
    found = given.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert found == PopLM(generator=ours, batch_size=2).generate_until(requests("generate_until", prompts), True)
    with pytest.raises(InputError, match="does not say where its prompt ends"):
        given.loglikelihood(requests("loglikelihood", choices()), disable_tqdm=True)


@pytest.mark.parametrize("depth", [4, 2])
def test_answers_stop_where_the_hf_model_stops(base, depth):
    ours = generator(base, depth)
    lm = PopLM(generator=ours, batch_size=2)
    reference = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(str(base)), batch_size=2)
    prompts = [(text(words, seed), {"until": [], "max_gen_toks": 9}) for seed, words in enumerate((12, 5, 8))]
    plain = reference.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    stop = plain[0].split()[2]
    prompts = [(prompt, {"until": [stop], "max_gen_toks": 9}) for prompt, _ in prompts]
    expected = reference.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert expected[0] != plain[0]
    found = lm.generate_until(requests("generate_until", prompts), True)
    assert (found == expected) == (depth == 4)
    assert PopLM(generator=ours, batch_size=2, full=True).generate_until(requests("", prompts), True) == expected
    one = [lm.tok_encode(prompts[1][0])]
    alone = ours.generate(torch.tensor(one), max_new_tokens=9, do_sample=False)[0, len(one[0]) :]
    assert lm.tok_decode(alone).partition(stop)[0] == found[1]


def test_the_full_model_runs_in_the_same_way(base):
    ours = generator(base)
    reference = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(str(base)))
    expected = reference.loglikelihood(requests("loglikelihood", choices()), disable_tqdm=True)
    found = PopLM(generator=ours, full=True, batch_size=4).loglikelihood(requests("loglikelihood", choices()), True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_contexts_are_cut_and_begun_as_the_hf_model_does(base):
    ours = generator(base, depth=4)
    pairs = [(text(30, 1), f" {text(5, 2)}"), ("", text(4, 3)), (f"{text(5, 4)} ", text(2, 5))]
    for settings in ({"max_length": 12}, {"add_bos_token": False}, {"add_bos_token": True, "prefix_token_id": 7}):
        reference = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(str(base)), **settings)
        expected = reference.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        lm = PopLM(generator=ours, batch_size=2, **settings)
        found = lm.loglikelihood(requests("loglikelihood", pairs), True)
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    messages = [{"role": "user", "content": "w1 w2"}]
    assert lm.apply_chat_template(messages) == reference.apply_chat_template(messages) == "w1 w2 w9"


def test_salient_tokens_and_batch_size_auto_run(base):
    ours = generator(base, depth=2, salient=2)
    one = PopLM(generator=ours, batch_size=1).loglikelihood(requests("loglikelihood", choices()), True)
    found = PopLM(generator=ours, batch_size="auto", max_length=32, max_batch_size=8)
    answers = found.loglikelihood(requests("loglikelihood", choices()), True)
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in one], abs=1e-3)


def test_what_cannot_be_measured_is_refused_by_name(base):
    ours = generator(base)
    with pytest.raises(InputError, match="unknown argument of the pop model: parallelize"):
        PopLM(generator=ours, parallelize=True)
    with pytest.raises(InputError, match=r"artifact=DIR.*neither is given"):
        PopLM()
    with pytest.raises(InputError, match="no tokenizer"):
        PopLM(generator=StageAwareGenerator(build("llama"), PruningPlan(2)))
    images = StageAwareGenerator(vision.build("gemma3"), PruningPlan(2))
    with pytest.raises(InputError, match="Gemma3ForConditionalGeneration reads images"):
        PopLM(generator=images)
    lm = PopLM(generator=ours, max_length=16)
    with pytest.raises(InputError, match="generates up to 16 tokens, and the model's context is 16"):
        lm.generate_until(requests("generate_until", [("w1", {"max_gen_toks": 16})]))
    with pytest.raises(InputError, match="a continuation has 17 tokens: expected 1 to 16"):
        lm.loglikelihood(requests("loglikelihood", [("w1", f" {text(17, 0)}")]), True)
