"""π-Attention in a GPT of your own: the layer takes the place of causal self-attention. Trains on bytes, on a laptop.

python examples/gpt.py --steps 200
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_attention import coordinated_heads
from pi_attention.accelerator import best_device
from pi_attention.data.corpus import load_documents
from pi_attention.nn import PiAttention


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        pattern = coordinated_heads(window=32, skips=32, heads=heads)  # 64 keys a query, 160 lags seen together
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = PiAttention(width, heads, pattern)  # causal, with rotary positions and the fusion gate
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 128, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, 256]
        return self.head(self.norm(self.blocks(self.embedding(ids))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = best_device()
    text = torch.tensor(list("\n".join(load_documents("shakespeare")).encode()))
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        start = torch.randint(len(text) - options.context - 1, (4,))
        rows = torch.stack([text[s : s + options.context + 1] for s in start]).to(device)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
