"""RLD in a training loop of your own: PyTorch and nothing else. `python examples/plain_pytorch.py`."""

import torch
from torch import nn

from rld_lightning import RLDLoss


def train(student: nn.Module, teacher: nn.Module, images: torch.Tensor, label: torch.Tensor, epochs: int) -> float:
    """Distils on images ``(N, D)`` in batches of 32; gives the last loss."""
    criterion = RLDLoss(alpha=1.0, beta=8.0, temperature=4.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    teacher.eval()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(32):
            with torch.no_grad():
                teacher_logits = teacher(images[chosen])
            terms = criterion(student(images[chosen]), teacher_logits, label[chosen])
            loss = terms["ce"] + terms["scd"] + terms["mcd"]  # or sum(terms.values()), of any method
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


if __name__ == "__main__":
    torch.manual_seed(0)
    teacher, student = nn.Linear(16, 10), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))
    images = torch.randn(512, 16)
    label = teacher(images).argmax(-1)
    print(f"last loss {train(student, teacher, images, label, epochs=10):.3f}")
    print(f"agreement {(student(images).argmax(-1) == label).float().mean():.1%}")
