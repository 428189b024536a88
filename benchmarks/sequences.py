"""What estimator="sequence" costs and how sure it is, on the CPU: ``python -m benchmarks.sequences``.

Steps with and without it alternate, on a Llama shape of two layers for every width; a table of the least times, because
others use the cores too. ``--errors`` compares a step's statistics with float64 gradients of one row at a time, on 10 M
parameters. ``--memory`` compares the peak memory of such steps, by the profiler's record of every allocation, and
writes ``benchmarks/results/sequence_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import gac

MEMORY = Path(__file__).parent / "results" / "sequence_memory.json"
FIELDS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2")


def model_of(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A Llama shape with untied head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch_of(rows: int, length: int, vocabulary: int) -> SimpleNamespace:
    """A mixed batch, demonstrations first."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    is_expert = torch.arange(rows) < rows // 2
    advantages = torch.randn(rows, generator=generator)
    weights = torch.where(is_expert, 1.0, advantages) / (rows // 2)
    return SimpleNamespace(ids=ids, is_expert=is_expert, weights=weights)


def row_losses(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    """``[B]``, with each row's weight."""
    logp = model(input_ids=batch.ids).logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, batch.ids[:, 1:, None])[..., 0].mean(1) * batch.weights


def plain(model: nn.Module, batch: SimpleNamespace) -> None:
    losses = row_losses(model, batch)
    (0.4 * losses[batch.is_expert].sum() + 0.6 * losses[~batch.is_expert].sum()).backward()


def measured(mixer: gac.Mixer, model: nn.Module, batch: SimpleNamespace) -> None:
    with mixer.batch(is_expert=batch.is_expert):
        losses = row_losses(model, batch)
        loss = mixer.mixed_loss(sft_loss=losses[batch.is_expert].sum(), rl_loss=losses[~batch.is_expert].sum())
        loss.backward()
    mixer.step()


def seconds(widths: list[int], sizes: list[int], rounds: int, rows: int, length: int) -> None:
    """Prints a row for each width and sketch size."""
    print(
        f"{rows} rows of {length} tokens, {torch.get_num_threads()} threads, processor time, least of {rounds} rounds"
    )
    print("width  k   plain s  with s  share  sketch bytes of the gradient's")
    for width in widths:
        model = model_of(width, 2, 1024)
        batch = batch_of(rows, length, 1024)
        for size in sizes:
            found: dict[str, list[float]] = {"plain": [], "with": []}
            for k in range(rounds + 1):
                for name in found:
                    model.zero_grad()
                    mixer = None
                    if name == "with":
                        mixer = gac.patch(
                            model, estimator="sequence", sketch_size=size, interval=1, law="fixed", mu=0.4
                        )
                        measured(mixer, model, batch)  # the first holds sequences against gradients
                        model.zero_grad()
                    start = time.process_time()
                    measured(mixer, model, batch) if mixer else plain(model, batch)
                    if k:
                        found[name].append(time.process_time() - start)
                    if mixer:
                        width_of_row = mixer.coverage.width
                        mixer.unpatch()
            a, b = (min(found[name]) for name in found)
            gradient = 4 * sum(p.numel() for p in model.parameters())
            share = 4 * (rows + 2) * width_of_row / gradient
            print(f"{width:5} {size:3} {a:8.3f} {b:8.3f} {b / a - 1:6.1%} {share:6.2%}", flush=True)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that a step has allocated at one time, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def memory(widths: list[int], sizes: list[int], rows: int, length: int) -> list[dict[str, float]]:
    """Peak bytes of a step, weights included, with and without the estimator; prints each."""
    found = []
    for width in widths:
        model, batch = model_of(width, 2, 1024), batch_of(rows, length, 1024)
        held = 4 * sum(p.numel() for p in model.parameters())
        plain(model, batch)
        model.zero_grad()
        without = held + peak_bytes(lambda: plain(model, batch))  # noqa: B023 - called at once
        for size in sizes:
            model.zero_grad()
            with gac.patch(model, estimator="sequence", sketch_size=size, interval=1, law="fixed", mu=0.4) as mixer:
                measured(mixer, model, batch)  # the first holds sequences against gradients
                model.zero_grad()
                peak = held + mixer.nbytes + peak_bytes(lambda: measured(mixer, model, batch))  # noqa: B023
            row = {"width": width, "sketch_size": size, "plain": without, "with": peak, "more": peak / without - 1}
            print(f"{width:5} {size:3} {without / 1e6:8.1f} MB {peak / 1e6:8.1f} MB {row['more']:7.2%}", flush=True)
            found.append(row)
        model.zero_grad()
    return found


def errors(sizes: list[int], draws: int) -> None:
    """Prints the root mean square relative error of one step, over draws of signs."""
    model = model_of(320, 6, 1024)
    batch = batch_of(16, 48, 1024)
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, {draws} draws")
    gradients: dict[bool, list[Tensor]] = {True: [], False: []}
    for k in range(len(batch.ids)):
        own = SimpleNamespace(ids=batch.ids[k : k + 1], weights=batch.weights[k : k + 1])
        found = torch.autograd.grad(row_losses(model, own)[0], parameters)
        gradients[bool(batch.is_expert[k])].append(torch.cat([g.double().flatten() for g in found]))
    s, r = (torch.stack(gradients[branch]) for branch in (True, False))
    noise = [len(x) * float((x - x.mean(0)).square().sum()) / (len(x) - 1) for x in (s, r)]
    distance2 = float((s.sum(0) - r.sum(0)).square().sum())
    truth = torch.tensor([*noise, distance2 - sum(noise), distance2], dtype=torch.float64)
    optimum = lambda x: (x[..., 2] / 2 + x[..., 1]) / x[..., 3]
    for name, rows in (("4 micro-batches a branch", 4), ("2", 2)):
        parts = [x.view(rows, -1, x.shape[1]).sum(1) for x in (s, r)]
        rough = [rows * float((x - x.mean(0)).square().sum()) / (rows - 1) for x in parts]
        row = torch.tensor([*rough, distance2 - sum(rough), distance2], dtype=torch.float64)
        print(name, [f"{float(e):+.1%}" for e in row / truth - 1], f"mu {float(optimum(row) - optimum(truth)):+.3f}")
    for size in sizes:
        mixer = gac.patch(model, estimator="sequence", sketch_size=size, interval=1, law="fixed", mu=0.4)
        rows_found = []
        for _ in range(draws):
            model.zero_grad()
            measured(mixer, model, batch)
            rows_found.append([float(getattr(mixer.statistics, name)) for name in FIELDS])
        mixer.unpatch()
        table = torch.tensor(rows_found, dtype=torch.float64)
        off = (table / truth - 1).square().mean(0).sqrt()
        mu = (optimum(table) - optimum(truth)).square().mean().sqrt()
        figures = ", ".join(f"{name} {float(e):.1%}" for name, e in zip(FIELDS, off, strict=True))
        print(f"k = {size}: {figures}, mu {float(mu):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=MEMORY, help="of --memory")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    if options.memory:
        rows = memory(options.widths, options.sizes, options.rows, options.length)
        about = {"command": " ".join(["python -m benchmarks.sequences", *sys.argv[1:]]), "torch": torch.__version__}
        about |= {"rows": options.rows, "length": options.length}
        options.out.write_text(json.dumps(about | {"peaks": rows}, indent=1) + "\n")
    elif options.errors:
        errors(options.sizes, draws=20)
    else:
        seconds(options.widths, options.sizes, options.rounds, options.rows, options.length)


if __name__ == "__main__":
    main()
