"""The command that trained the bundled model: ``python -m pop_lightning.checkpoints.train --output FOLDER --seed 0``.

Looking things up is slow to learn from documents alone, so training starts with repeated random sequences (copying is
the first half of a look-up), then asks many questions after each document, with more people as accuracy allows.
"""

import argparse
import os
import random
import shutil
import time
from pathlib import Path

import torch
from pop_lightning.checkpoints.facts import KINDS, document, question, row, vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
LENGTH = 480


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, BOS, EOS, UNK, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(words: int) -> Gemma3ForCausalLM:
    # Every third layer is global, four of them in all, two above half depth: the pruned part has far context to lose.
    layers = ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(12)]
    config = Gemma3TextConfig(
        vocab_size=words,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=24,
        max_position_embeddings=1024,
        sliding_window=32,
        layer_types=layers,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma3ForCausalLM(config)


def copy_batch(generator: torch.Generator, words: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences, each twice; the second copy is the target."""
    once = torch.randint(4, words, (rows, length), generator=generator)
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), once, once], dim=1)
    labels = ids.clone()
    labels[:, : length + 1] = -100
    return ids, labels


def question_batch(rng: random.Random, tokenizer, rows: int, people: int, kinds) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each followed by as many questions as fit; the answers are the target."""
    ids, labels = [], []
    for _ in range(rows):
        text, persons = document(rng, people, distractors=rng.randint(0, max(1, people // 2)))
        line = list(tokenizer(text)["input_ids"])
        target = [-100] * len(line)
        while True:
            asked, answer = question(rng, persons, rng.choice(kinds))
            prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
            reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(line) + len(prompt) + len(reply) > LENGTH or len(line) > 40 * people + 60:
                break
            line += prompt + reply
            target += [-100] * len(prompt) + reply
        ids.append(line)
        labels.append(target)
    width = max(map(len, ids))
    pad = lambda lines, value: torch.tensor([line + [value] * (width - len(line)) for line in lines])  # noqa: E731
    return pad(ids, 0), pad(labels, -100)


def train(seed: int, copy_steps: int, steps: int, checkpoint=None):
    torch.manual_seed(seed)
    rng, generator = random.Random(f"train {seed}"), torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    total = copy_steps + steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (total - step) / (0.3 * total)))
    )
    people, kinds, accuracy = 2, ["lookup"], 0.0
    bar = tqdm(range(total), unit="step")
    for step in bar:
        if step < copy_steps:
            length = 16 + (step * 100) // copy_steps
            ids, labels = copy_batch(generator, len(tokenizer), 16, length)
        else:
            ids, labels = question_batch(rng, tokenizer, 16, people, kinds)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        real = labels[:, 1:] != -100
        logits, targets = logits[real], labels[:, 1:][real]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        hit = (logits.argmax(-1) == targets).float().mean().item()
        accuracy = hit if step in (0, copy_steps) else 0.9 * accuracy + 0.1 * hit
        if step > copy_steps + 20 and accuracy > 0.93 and (people < 11 or len(kinds) < 3):
            if len(kinds) < 3 and people >= 4:
                kinds = list(KINDS[: len(kinds) + 1])
            else:
                people += 1
            accuracy = 0.8
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}", people=people, kinds=len(kinds))
    return model.eval(), tokenizer


@torch.no_grad()
def evaluate(model, tokenizer, rows: int, seed: int) -> dict[str, float]:
    """Greedy exact match by kind on fresh documents."""
    hits = {kind: [] for kind in KINDS}
    examples = [row(seed, index) for index in range(rows)]
    for start in range(0, rows, 32):
        batch = examples[start : start + 32]
        inputs = tokenizer([each["prompt"] for each in batch], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for each, text in zip(batch, texts, strict=True):
            hits[each["kind"]].append(text.strip() == each["response"])
    return {kind: sum(values) / len(values) for kind, values in hits.items()}


CARD = """---
license: apache-2.0
library_name: transformers
---
# facts-gemma3

A Gemma-3-architecture decoder (12 layers, hidden size 96, sliding window 32, 4 global layers) that answers questions
about documents of facts: look-up, comparison, two hops. Made for POP Lightning's demo and tests; it knows nothing else.

Trained by `python -m pop_lightning.checkpoints.train --output FOLDER --seed {seed}` in {minutes:.0f} minutes on
{threads} CPU threads with torch {torch}. Greedy exact match on {rows} fresh documents: {accuracy}.

`calibration.jsonl` is `python -m pop_lightning.checkpoints.facts --rows 1500 --seed 7 --output calibration.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy_steps", type=int, default=450)
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = train(arguments.seed, arguments.copy_steps, arguments.steps)
    minutes = (time.perf_counter() - start) / 60
    accuracy = evaluate(model, tokenizer, rows=600, seed=1_000_003)
    print(f"{minutes:.1f} minutes, exact match on 600 fresh documents: {accuracy}")
    temporary = arguments.output.with_name(arguments.output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config.do_sample = False
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(
        CARD.format(
            seed=arguments.seed,
            minutes=minutes,
            threads=torch.get_num_threads(),
            torch=torch.__version__.split("+")[0],
            rows=600,
            accuracy=", ".join(f"{kind} {value:.1%}" for kind, value in accuracy.items()),
        )
    )
    shutil.rmtree(arguments.output, ignore_errors=True)
    os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()
