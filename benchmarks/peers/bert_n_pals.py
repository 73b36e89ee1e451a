"""A worker: BERT with PALs in plain PyTorch, written like Stickland & Murray's code.

It has separate projections, explicit scores and softmax, batches padded to the maximal length, and
an optimiser that loops over tensors. Its tensors have the original names, so that the converter of
pals_jax can write the same weights for it.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from worker import serve


class LayerNorm(nn.Module):
    def __init__(self, size, eps=1e-12):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * ((x - mean) / torch.sqrt(variance + self.eps)) + self.beta


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class SelfAttention(nn.Module):
    def __init__(self, size, heads, rate):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dropout = nn.Dropout(rate)

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x, mask):
        query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        probabilities = self.dropout(torch.softmax(scores, dim=-1))
        return (probabilities @ value).permute(0, 2, 1, 3).contiguous().view(*x.shape)


class Output(nn.Module):
    def __init__(self, inputs, size, rate):
        super().__init__()
        self.dense = nn.Linear(inputs, size)
        self.LayerNorm = LayerNorm(size)
        self.dropout = nn.Dropout(rate)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config["hidden_size"]
        rate = config["attention_probs_dropout_prob"]
        self.self = SelfAttention(size, config["num_attention_heads"], rate)
        self.output = Output(size, size, config["hidden_dropout_prob"])

    def forward(self, x, mask):
        y = self.output.dropout(self.output.dense(self.self(x, mask)))
        return self.output.LayerNorm(y + x)


class Intermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config["hidden_size"], config["intermediate_size"])


class Pal(nn.Module):
    """One task's PAL in one layer; all layers share the projections `down` and `up`."""

    def __init__(self, config, down, up):
        super().__init__()
        self.aug_dense, self.aug_dense2 = down, up
        self.attn = SelfAttention(
            config["hidden_size_aug"], 12, config["attention_probs_dropout_prob"]
        )

    def forward(self, x, mask):
        return gelu(self.aug_dense2(self.attn(self.aug_dense(x), mask)))


class Layer(nn.Module):
    def __init__(self, config, downs, ups):
        super().__init__()
        size = config["hidden_size"]
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config["intermediate_size"], size, config["hidden_dropout_prob"])
        self.multi_layers = nn.ModuleList(
            Pal(config, down, up) for down, up in zip(downs, ups, strict=True)
        )

    def forward(self, x, mask, task):
        a = self.attention(x, mask)
        y = self.output.dropout(self.output.dense(gelu(self.intermediate.dense(a))))
        return self.output.LayerNorm(y + a + self.multi_layers[task](x, mask))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        tasks, size, small = len(config["labels"]), config["hidden_size"], config["hidden_size_aug"]
        self.mult_aug_dense = nn.ModuleList(nn.Linear(size, small) for _ in range(tasks))
        self.mult_aug_dense2 = nn.ModuleList(nn.Linear(small, size) for _ in range(tasks))
        self.layer = nn.ModuleList(
            Layer(config, self.mult_aug_dense, self.mult_aug_dense2)
            for _ in range(config["num_hidden_layers"])
        )


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], size)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], size)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], size)
        self.LayerNorm = LayerNorm(size)
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, ids, types):
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings(types)))


class Pooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config["hidden_size"], config["hidden_size"])


class Bert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)


class MultiTask(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.labels = config["labels"]
        self.bert = Bert(config)
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])
        self.classifier = nn.ModuleList(nn.Linear(config["hidden_size"], n) for n in self.labels)

    def forward(self, ids, types, mask, task, targets):
        visible = (1.0 - mask[:, None, None].float()) * -10000.0
        h = self.bert.embeddings(ids, types)
        for layer in self.bert.encoder.layer:
            h = layer(h, visible, task)
        pooled = torch.tanh(self.bert.pooler.dense(h[:, 0]))
        logits = self.classifier[task](self.dropout(pooled))
        if self.labels[task] == 1:
            return nn.functional.mse_loss(logits[:, 0], targets)
        return nn.functional.cross_entropy(logits, targets.long())


class BertAdam:
    """Adam without bias correction, with decoupled decay, one tensor after the other."""

    def __init__(self, model, rate=2e-5, decay=0.01, b1=0.9, b2=0.999, eps=1e-6):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.decay = {
            p: 0.0 if name.endswith(("bias", "gamma", "beta")) else decay
            for name, p in model.named_parameters()
        }
        self.state = {}

    @torch.no_grad()
    def step(self):
        for p, decay in self.decay.items():
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p] = torch.zeros_like(p), torch.zeros_like(p)
            m, v = self.state[p]
            nn.utils.clip_grad_norm_(p, 1.0)
            m.mul_(self.b1).add_(p.grad, alpha=1 - self.b1)
            v.mul_(self.b2).addcmul_(p.grad, p.grad, value=1 - self.b2)
            update = m / (v.sqrt() + self.eps)
            p.sub_(self.rate * (update + decay * p))
            p.grad.detach_().zero_()


def main():
    work = Path(sys.argv[1])
    torch.set_num_threads(os.cpu_count() or 1)
    config = json.loads((work / "config.json").read_text())
    state = {k: torch.tensor(v) for k, v in np.load(work / "weights.npz").items()}
    model = MultiTask(config)
    model.load_state_dict(state)
    steps = {name: torch.tensor(x) for name, x in np.load(work / "padded.npz").items()}
    optimizer = BertAdam(model)

    def loss(i):
        names = ("input_ids", "token_type_ids", "attention_mask")
        task = int(steps["task_ids"][i])
        return model(*(steps[n][i].long() for n in names), task, steps["targets"][i])

    model.eval()
    with torch.no_grad():
        first = [float(loss(i)) for i in range(config["check"])]
    model.train()

    def do(begin, end):
        for i in range(begin, end):
            loss(i).backward()
            optimizer.step()

    serve({"losses": first}, do)


if __name__ == "__main__":
    main()
