"""MoHD beside a dense decoder, trained side by side on real text; the losses are printed, and as JSON with --out FILE.

    python bench/experiments/mohd_losses.py [--steps 600] [--out FILE]

The text is the bytes of CPython's help topics, a tenth of it held out. The models are tiny: a dense decoder, one whose
tokens use half of as many hidden dimensions, and one twice as wide whose tokens use as many as the dense one has. All
see the same batches and start from the same seed. What such small models say about large ones is not known.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "python")]

import harness  # noqa: E402

from warpform.models import MoHDConfig, MoHDForCausalLM  # noqa: E402

SEQLEN, BATCH, SEED = 128, 16, 0
BASE = {
    "vocab_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": SEQLEN,
}
ROUTED = {"num_groups": 16, "num_shared": 6, "top_k": 2, "scale_mode": "groups"}
SETTINGS = {
    "dense": {"hidden_size": 128, "num_groups": 0, "num_shared": 0, "top_k": 0},
    "50%": {"hidden_size": 128, **ROUTED},
    "2x": {"hidden_size": 256, **ROUTED},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), device=options.device)
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    rows = []
    print(f"{'setting':8} {'parameters':>10} {'in use':>9} {'loss':>7} {'held out':>9} {'balance':>8} {'seconds':>8}")
    for setting, fields in SETTINGS.items():
        row = train_one(setting, MoHDConfig(**{**BASE, **fields}), train, held_out, options.steps)
        rows.append(row)
        print(
            f"{setting:8} {row['parameters']:10,} {row['activated']:9,} {row['loss']:7.3f} {row['held_out']:9.3f} "
            f"{row['balance']:8.3f} {row['seconds']:8.1f}",
            flush=True,
        )
    if options.out is not None:
        facts = harness.machine("cuda" if options.device.startswith("cuda") else "cpu")
        options.out.write_text(
            json.dumps({**facts, "steps": options.steps, "seed": SEED, "rows": rows}, indent=1) + "\n"
        )


def train_one(setting: str, config: MoHDConfig, train: Tensor, held_out: Tensor, steps: int) -> dict[str, float | str]:
    """The mean loss of the last twentieth of the steps, and of the held-out text, both without the balance loss."""
    torch.manual_seed(SEED)
    model = MoHDForCausalLM(config).to(train.device)
    batches = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    start, losses = time.perf_counter(), []
    for _ in range(steps):
        begin = torch.randint(len(train) - SEQLEN, (BATCH, 1), generator=batches).to(train.device)
        ids = train[begin + torch.arange(SEQLEN, device=train.device)]
        out = model(ids, labels=ids)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(language_loss(out.loss, out.balance_loss, config))
    seconds = time.perf_counter() - start
    rows = held_out[: len(held_out) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    with torch.inference_mode():
        found = [(model(ids, labels=ids), len(ids)) for ids in rows.split(64)]
    total = sum(n for _, n in found)
    balance = [float(out.balance_loss) * n for out, n in found if out.balance_loss is not None]
    last = losses[-max(1, steps // 20) :]
    return {
        "setting": setting,
        "parameters": sum(p.numel() for p in model.layers.parameters()),
        "activated": model.activated_parameters(),
        "loss": sum(last) / len(last),
        "held_out": sum(language_loss(out.loss, out.balance_loss, config) * n for out, n in found) / total,
        "balance": sum(balance) / total if balance else float("nan"),
        "seconds": seconds,
    }


def language_loss(loss: Tensor, balance: Tensor | None, config: MoHDConfig) -> float:
    return float(loss.detach()) - (0.0 if balance is None else config.balance_loss_weight * float(balance.detach()))


if __name__ == "__main__":
    main()
