"""Trains the small Gemma-3 model that ships with the repository, from scratch, on one CPU core.

It comes between `facts.py` (the data) and `checkpoints/facts-gemma3` (the checkpoint that examples, tests and
`pop-fit` use). Look-up from scratch stays on a plateau for thousands of steps, so the model first learns to copy the
second half of repeated random sequences, then reads documents of facts that grow whenever it answers 95% of the
questions. Each training document carries many questions; every question sees the document and itself only, at the
positions it would have were it the only one, so training matches the evaluation format exactly.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

from pop_lightning.checkpoints import facts

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WINDOW = 32
HEAD_DIM = 32  # the smallest that the CPU attention of serving engines accepts
FULL_LAYERS = (2, 4, 6, 8, 10)
EVALUATION_SEED = 1_000_003
CALIBRATION_ROWS, CALIBRATION_SEED = 1500, 7
# People, documents per batch, questions per document; the last is the document of the evaluation.
STAGES = ((2, 16, 8), (3, 12, 12), (5, 8, 16), (8, 6, 20))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; `<bos>` is prepended, and decoding joins the words with single spaces."""
    words = {word: index for index, word in enumerate([*SPECIAL, *facts.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Gemma3ForCausalLM:
    """12 layers, five of them global, the others with a window far shorter than a document."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        layer_types=["full_attention" if layer in FULL_LAYERS else "sliding_attention" for layer in range(12)],
        sliding_window=WINDOW,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Gemma3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def copy_batch(rng: random.Random, rows: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences, each repeated once; the labels cover the second copy except its first word."""
    length = rng.randint(16, 48)
    words = torch.tensor([rng.sample(range(len(SPECIAL), vocabulary), length) for _ in range(rows)])
    ids = torch.cat([torch.full((rows, 1), SPECIAL.index("<bos>")), words, words], dim=1)
    labels = ids.clone()
    labels[:, : length + 2] = -100
    return ids, labels


def facts_batch(rng: random.Random, words: dict[str, int], rows: int, people: int, questions: int) -> dict:
    """Documents with many questions each, and the masks that keep the questions from seeing one another."""
    columns = []
    for _ in range(rows):
        text, persons = facts.document(rng, people, rng.randint(people, people * 3 // 2))
        ids = [words["<bos>"], *(words[word] for word in text.split())]
        start = len(ids)
        labels, positions, segments, kinds = [-100] * start, list(range(start)), [0] * start, [-1] * start
        for segment in range(1, questions + 1):
            kind = rng.randrange(len(facts.KINDS))
            asked, answer = facts.question(rng, persons, facts.KINDS[kind])
            prompt = [words[word] for word in asked.split()]
            target = [*(words[word] for word in answer.split()), words["<eos>"]]
            size = len(prompt) + len(target)
            ids += prompt + target
            labels += [-100] * len(prompt) + target
            positions += range(start, start + size)
            segments += [segment] * size
            kinds += [kind] * size
        columns.append((ids, labels, positions, segments, kinds))
    length = max(len(column[0]) for column in columns)
    ids, labels, positions, segments, kinds = (
        torch.tensor([column[part] + [fill] * (length - len(column[part])) for column in columns])
        for part, fill in enumerate((words["<pad>"], -100, 0, -1, -1))
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    full = (causal & seen)[:, None]
    near = (positions[:, :, None] - positions[:, None, :] < WINDOW)[:, None]
    masks = {"full_attention": full, "sliding_attention": full & near}
    # A padded row that sees nothing in its window would be undefined: let it see itself.
    masks = {name: mask | torch.eye(length, dtype=torch.bool) for name, mask in masks.items()}
    return {"ids": ids, "labels": labels, "positions": positions, "kinds": kinds, "masks": masks}


def answer_loss(model: Gemma3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, **inputs) -> tuple:
    """Mean cross-entropy of the labelled tokens, which of them are right, and where they are."""
    hidden = model.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[:, :-1]
    where = labels[:, 1:] != -100
    logits = model.lm_head(hidden[where])
    target = labels[:, 1:][where]
    return F.cross_entropy(logits, target), logits.argmax(-1) == target, where


@torch.no_grad()
def evaluate(
    model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: int, seed: int = EVALUATION_SEED
) -> dict[str, float]:
    """Greedy exact match on fresh full-length documents: per kind, and over all of them."""
    model.eval()
    rows = [facts.row(seed, index) for index in range(documents)]
    right: dict[str, list[bool]] = {kind: [] for kind in facts.KINDS}
    for start in range(0, documents, 32):
        chunk = rows[start : start + 32]
        inputs = tokenizer([entry["prompt"] for entry in chunk], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for entry, text in zip(chunk, texts, strict=True):
            right[entry["kind"]].append(text.strip() == entry["response"].strip())
    model.train()
    scores = {kind: sum(hits) / max(1, len(hits)) for kind, hits in right.items()}
    scores["all"] = sum(sum(hits) for hits in right.values()) / documents
    return scores


def save(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, card: str) -> None:
    """Write the checkpoint to a temporary sibling, then move it into place."""
    draft = output.with_name(output.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    facts.write(draft / "calibration.jsonl", CALIBRATION_ROWS, CALIBRATION_SEED)
    (draft / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(draft, output)


def model_card(seed: int, scores: dict[str, float], documents: int, steps: int, minutes: float, size: int) -> str:
    """The README of the checkpoint: where it comes from and what it can do."""
    table = "\n".join(f"| {kind} | {score:.1%} |" for kind, score in scores.items())
    return f"""---
license: apache-2.0
library_name: transformers
---
# facts-gemma3

A Gemma-3 text model ({size:,} parameters, 12 layers of which {len(FULL_LAYERS)} are global, sliding window {WINDOW}),
trained from scratch on generated documents of facts. It reads about 200 to 250 words and answers one question about
them. It knows {len(facts.vocabulary())} words and nothing else: made for POP Lightning's demo and tests.

Made by

    python -m pop_lightning.checkpoints.train --output checkpoints/facts-gemma3 --seed {seed}

in {minutes:.1f} minutes on {torch.get_num_threads()} CPU threads ({steps} steps, torch {torch.__version__}).

Greedy exact match on {documents} fresh documents (`facts.row({EVALUATION_SEED}, index)`):

| kind | right |
|---|---|
{table}

`two_hop` answers name the friend before the city ("Boris in Oslo"), so the second hop is taken while decoding.

`calibration.jsonl` is
`python -m pop_lightning.checkpoints.facts --rows {CALIBRATION_ROWS} --seed {CALIBRATION_SEED} --output FILE.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled Gemma-3 model on documents of facts.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="train, and write the checkpoint here")
    what.add_argument("--evaluate", type=Path, help="train nothing: greedy exact match of this checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy-steps", type=int, default=900, help="at most; ends at 99%% right")
    parser.add_argument("--stage-steps", type=int, default=1500, help="at most, per document size; ends at 95%% right")
    parser.add_argument("--final-steps", type=int, default=800, help="on full-length documents, learning rate to zero")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--documents", type=int, default=480, help="fresh documents for the final evaluation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more can be slower on a busy machine")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.evaluate is not None:
        model = Gemma3ForCausalLM.from_pretrained(options.evaluate)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.evaluate, padding_side="left")
        print(json.dumps(evaluate(model, tokenizer, options.documents)))
        return
    began = time.time()
    torch.manual_seed(options.seed)
    rng = random.Random(f"train/{options.seed}")
    tokenizer = build_tokenizer()
    words = tokenizer.get_vocab()
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    steps = 0

    def update(loss: torch.Tensor, rate: float = 1.0) -> None:
        nonlocal steps
        steps += 1
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate * min(1.0, steps / 50)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def learn_to_copy() -> None:
        smooth = 0.0
        for _ in (bar := tqdm(range(options.copy_steps), desc="copy", mininterval=5)):
            loss, hits, _ = answer_loss(model, *copy_batch(rng, 16, len(tokenizer)))
            update(loss)
            smooth += 0.05 * (hits.float().mean().item() - smooth)
            bar.set_postfix_str(f"loss {loss.item():.3f} right {smooth:.3f}")
            if smooth > 0.99:
                break

    def learn_facts(people: int, rows: int, questions: int, most: int, final: bool = False) -> None:
        """Documents of one size, until every kind is 95% right; the final stage runs to its end, its rate to zero."""
        smooth = [0.0] * len(facts.KINDS)
        for step in (bar := tqdm(range(most), desc=f"{people} people", mininterval=5)):
            batch = facts_batch(rng, words, rows, people, questions)
            loss, hits, where = answer_loss(
                model, batch["ids"], batch["labels"], attention_mask=batch["masks"], position_ids=batch["positions"]
            )
            update(loss, 1.0 - step / most if final else 1.0)
            kinds = batch["kinds"][:, 1:][where]
            for kind in range(len(facts.KINDS)):
                smooth[kind] += 0.05 * (hits[kinds == kind].float().mean().item() - smooth[kind])
            right = " ".join(f"{kind} {value:.3f}" for kind, value in zip(facts.KINDS, smooth, strict=True))
            bar.set_postfix_str(f"loss {loss.item():.3f} {right}")
            if min(smooth) > 0.95 and not final:
                break

    def finish(documents: int) -> None:
        scores = evaluate(model, tokenizer, documents)
        tqdm.write(json.dumps(scores))
        minutes = (time.time() - began) / 60
        card = model_card(options.seed, scores, documents, steps, minutes, model.num_parameters())
        save(model, tokenizer, options.output, card)

    learn_to_copy()
    for people, rows, questions in STAGES:
        learn_facts(people, rows, questions, options.stage_steps)
    finish(96)  # usable already; the final stage makes it better
    learn_facts(*STAGES[-1], options.final_steps, final=True)
    finish(options.documents)


if __name__ == "__main__":
    main()
