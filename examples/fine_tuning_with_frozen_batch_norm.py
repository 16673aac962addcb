"""Fine-tuning on small batches: a frozen batch norm keeps what it learned from many images.

A small network is trained on one task. Then its head is trained for another, on batches of two,
first with batch norm "frozen" by hand, as it is often done, and then by `freeze`.
"""

import copy

import torch
from torch import nn

from batchnorm import freeze, is_frozen, unfreeze


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(8, 2))


def images(count, generator):
    """Two classes: smooth images and noisy ones, of any brightness."""
    labels = torch.randint(2, (count,), generator=generator)
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    brightness = 3 * torch.randn(count, 1, 1, 1, generator=generator)
    return brightness + noise * (0.2 + labels.float().reshape(-1, 1, 1, 1)), labels


def train(model, batch_size, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for step in range(steps):
        if step % 10 == 0:
            model.train()  # every loop does this at the start of an epoch
        x, labels = images(batch_size, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def accuracy(model):
    x, labels = images(1000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == labels).float().mean().item()


def main():
    pretrained = network()
    train(pretrained, batch_size=64, steps=150, seed=1)
    print(f"pretrained: accuracy {accuracy(pretrained):.0%}")
    before = pretrained[0][1].running_var.clone()

    by_hand = copy.deepcopy(pretrained)
    by_hand[0].requires_grad_(False)
    by_hand[0][1].eval()
    train(by_hand, batch_size=2, steps=60, seed=2)
    moved = (by_hand[0][1].running_var / before - 1).abs().max().item()
    print(f"eval() and requires_grad_(False): running_var moved by up to {moved:.0%},", end=" ")
    print(f"accuracy {accuracy(by_hand):.0%}")

    frozen = copy.deepcopy(pretrained)
    frozen[0].requires_grad_(False)
    print(freeze(frozen))
    train(frozen, batch_size=2, steps=60, seed=2)
    moved = (frozen[0][1].running_var / before - 1).abs().max().item()
    print(f"freeze(model): running_var moved by {moved:.0%}, accuracy {accuracy(frozen):.0%}")
    print(f"still frozen: {is_frozen(frozen)}. {unfreeze(frozen)}")


if __name__ == "__main__":
    main()
