"""Train the bundled model: a Llama of 7 M parameters on public-domain speeches and Shakespeare.

The corpus folder holds `shakespeare.txt` and the folders `inaugural/` and `state_union/` with one
text per speech. The learning rate follows the wall clock (linear warm-up over 100 steps, then half
a cosine down to 5 % at the end of the given minutes), so the number of steps, and with it the
weights, depends on the machine; the data order depends on the seed alone. The shipped weights are
those of 45 minutes on two CPU cores with seed 0.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
BATCH = 16
CONTEXT = 256
PEAK_RATE = 1.5e-3
WARM_UP_STEPS = 100
FINAL_RATE = 0.05  # share of the peak
HELD_OUT_TOKENS = 20_000
STEPS_PER_REPORT = 50
BOS, EOS = 0, 1
SAMPLES = ("The United States of", "My fellow", "ROMEO:", "God bless", "The Soviet")


def read_documents(corpus: Path) -> list[str]:
    """Read the texts of the corpus with blanks and empty lines collapsed.

    Args:
        corpus: The folder of the corpus.

    Returns:
        One string per text: Shakespeare first, then the speeches by file name.
    """
    speeches = [
        path
        for folder in ("inaugural", "state_union")
        for path in sorted((corpus / folder).glob("*.txt"))
    ]
    return [_clean(_decode(path)) for path in (corpus / "shakespeare.txt", *speeches)]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE that puts `<s>` in front of every text.

    Args:
        documents: The texts.

    Returns:
        The tokenizer, `<s>` being token 0 and `</s>` token 1.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def make_model() -> LlamaForCausalLM:
    """Make the untrained model: d = 256, 8 layers, 8 heads, 4 key-value heads, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=None,
            initializer_range=0.02,
            rms_norm_eps=1e-5,
        )
    )


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def learning_rate(step: int, elapsed: float) -> float:
    """Give the learning rate of a step.

    Args:
        step: Number of the step, from 0.
        elapsed: Share of the training time that has passed, 0 to 1.

    Returns:
        The rate.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * elapsed))
    return PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(model: LlamaForCausalLM, ids: torch.Tensor, minutes: float) -> Iterator[str]:
    """Train on random windows, each with `<s>` in place of its first token.

    Args:
        model: The model, trained in place in float32.
        ids: All tokens of the corpus, int64 (n,); the last 20 000 are held out.
        minutes: Training time.

    Yields:
        A line on the losses every 50 steps.
    """
    training, held_out = ids[:-HELD_OUT_TOKENS], ids[-HELD_OUT_TOKENS:]
    validation = held_out[: BATCH * CONTEXT].reshape(BATCH, CONTEXT)
    optimizer = make_optimizer(model)
    model.train()
    start, step = time.monotonic(), 0
    while (elapsed := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, elapsed)
        offsets = torch.randint(len(training) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([training[offset : offset + CONTEXT] for offset in offsets])
        batch[:, 0] = BOS
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % STEPS_PER_REPORT == 0:
            with torch.no_grad():
                validated = model(input_ids=validation, labels=validation).loss
            seconds = time.monotonic() - start
            yield f"{step} {seconds:.0f} s loss {loss.item():.3f} validation {validated.item():.3f}"
        step += 1


def main(
    corpus: Annotated[Path, typer.Option(help="Folder of the texts.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    minutes: Annotated[float, typer.Option(help="Training time.", min=0.0)] = 45.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the data order.")] = 0,
) -> None:
    """Train the model and write it as a Hugging Face folder in bfloat16."""
    torch.manual_seed(seed)
    documents = read_documents(corpus)
    tokenizer = train_tokenizer(documents)
    ids = torch.cat([torch.tensor([*tokenizer.encode(text).ids, EOS]) for text in documents])
    model = make_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{sum(map(len, documents))} characters, {len(ids)} tokens, {parameters} parameters")
    for line in train(model, ids, minutes):
        typer.echo(line)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    model.float()
    for text in SAMPLES:
        inputs = fast(text, return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        typer.echo(repr(fast.decode(generated[0])))


def _decode(path: Path) -> str:
    """Read a text that is UTF-8 or, as some of the speeches are, Latin-1."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _clean(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text.replace("\r\n", "\n"))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


if __name__ == "__main__":
    typer.run(main)
