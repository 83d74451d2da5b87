"""The demo: a small character model on the operator of gla. It trains on chunks, decodes by steps, and compares the two.

The text is English that ships with Python (pydoc's topics). The model is a plain stack of layers, each one call of the operator
and a feed-forward net; nothing in it knows how the operator computes.
"""

from __future__ import annotations

import time
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional

from lagen.runtime.load import load

WIDTH, HEADS, KEY, VALUE, LAYERS = 128, 4, 16, 32, 2
BATCH, LENGTH, RATE = 8, 128, 4e-3
AGREEMENT = 1e-4
"""The largest difference between chunked and step-by-step logits, relative to the largest logit, that float32 explains."""


class Mixer(nn.Module):
    """Mixes tokens by gated linear attention: [B, T, WIDTH] in and out, or [B, WIDTH] a step."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator
        self.read = nn.Linear(WIDTH, HEADS * (3 * KEY + VALUE), bias=False)
        self.write = nn.Linear(HEADS * VALUE, WIDTH, bias=False)
        self.norm = nn.RMSNorm(VALUE)

    def tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Projects to q, k, v and the log-decay g of each head."""
        q, k, g, v = self.read(x).unflatten(-1, (HEADS, -1)).split([KEY, KEY, KEY, VALUE], dim=-1)
        return q, k, v, functional.logsigmoid(g + 4.0)

    def forward(self, x: Tensor) -> Tensor:
        """Runs over whole sequences."""
        return self.join(self.operator(*self.tensors(x)))

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Runs one token and moves ``state`` [B, HEADS, KEY, VALUE] on, in place."""
        o, _ = self.operator.step(*self.tensors(x), state)
        return self.join(o)

    def join(self, o: Tensor) -> Tensor:
        """Norms each head and joins them."""
        out: Tensor = self.write(self.norm(o).flatten(-2))
        return out


class Model(nn.Module):
    """Predicts the next character."""

    def __init__(self, operator: Any, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.embed = nn.Embedding(len(alphabet), WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.mixers = nn.ModuleList(Mixer(operator) for _ in range(LAYERS))
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, len(alphabet))

    def forward(self, tokens: Tensor, states: list[Tensor] | None = None) -> Tensor:
        """Returns logits of whole sequences [B, T], or, with ``states``, of one token [B]."""
        x = self.embed(tokens)
        for i, (mixer, net) in enumerate(zip(self.mixers, self.nets, strict=True)):
            assert isinstance(mixer, Mixer)
            y = self.norms[2 * i](x)
            x = x + (mixer(y) if states is None else mixer.step(y, states[i]))
            x = x + net(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits

    def states(self) -> list[Tensor]:
        """Makes the states before the first token of one sequence."""
        return [torch.zeros(1, HEADS, KEY, VALUE) for _ in self.mixers]

    def encode(self, text: str) -> Tensor:
        """Turns text into tokens; what is not in the alphabet is left out."""
        return torch.tensor([self.alphabet.index(c) for c in text if c in self.alphabet])


def run(steps: int, seed: int, prompt: str) -> bool:
    """Trains, generates and compares; returns whether the loss fell and both ways of running the model agree."""
    console = Console(soft_wrap=True)
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much where others use the cores
    torch.manual_seed(seed)
    text = "\n".join(topics[name] for name in sorted(topics))
    console.print(f"text: {len(text):,} characters of Python's own documentation")
    operator = load("gla")
    model = Model(operator, "".join(sorted(set(text))))
    console.print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, operator {operator!r}")
    tokens = model.encode(text)
    cut = len(tokens) * 9 // 10
    before = evaluate(model, tokens[cut:])
    train(model, tokens[:cut], steps, console)
    after = evaluate(model, tokens[cut:])
    console.print(f"loss on text it has not seen: {before:.3f} before, {after:.3f} after (nats a character)")
    generate(model, prompt, console)
    return compare(model, tokens[cut : cut + 200], console) and after < before


def batch(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draws ``count`` pieces of text, and the same pieces one character on."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (count, 1))
    pieces = tokens[starts + torch.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model: Model, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy in nats."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(model: Model, tokens: Tensor, steps: int, console: Console) -> None:
    """Trains under a progress bar; prints the loss now and then, where no terminal shows the bar too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"))
        recent = []
        for step in range(1, steps + 1):
            loss = loss_of(model, *batch(tokens, BATCH))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            bar.update(task, advance=1, loss=sum(recent[-20:]) / len(recent[-20:]))
            if step % max(1, steps // 6) == 0:
                bar.console.print(f"  step {step:4d}  loss {sum(recent[-20:]) / len(recent[-20:]):.3f}")


@torch.no_grad()
def evaluate(model: Model, tokens: Tensor) -> float:
    """Returns the loss on some of the held-out text, the same pieces every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return loss_of(model, *batch(tokens, 32)).item()


@torch.no_grad()
def generate(model: Model, prompt: str, console: Console, length: int = 240) -> None:
    """Continues the prompt, a step of the operator a character."""
    states, text = model.states(), prompt
    logits = torch.zeros(1, len(model.alphabet))
    start = time.perf_counter()
    for token in model.encode(prompt):
        logits = model(token[None], states)
    for _ in range(length):
        token = torch.multinomial(torch.softmax(logits[0] / 0.7, -1), 1)
        text += model.alphabet[int(token)]
        logits = model(token, states)
    rate = (len(prompt) + length) / (time.perf_counter() - start)
    console.print(f"generated by steps, {rate:.0f} characters a second:")
    console.print("\n".join(f"  | {line}" for line in text.splitlines()), markup=False, highlight=False)


@torch.no_grad()
def compare(model: Model, tokens: Tensor, console: Console) -> bool:
    """Runs one text in chunks and step by step; returns whether all logits agree."""
    chunked = model(tokens[None])[0]
    states = model.states()
    stepped = torch.cat([model(token[None], states) for token in tokens])
    error = ((chunked - stepped).abs().max() / chunked.abs().max()).item()
    agree: bool = error < AGREEMENT
    console.print(f"chunked against step by step over {len(tokens)} characters: logits differ by {error:.1e} of the largest; ", end="")
    console.print("they agree" if agree else f"more than {AGREEMENT:.0e}: THEY DO NOT AGREE")
    return agree
