"""What public distillation code does, for comparison: ``python -m rld_lightning.bench.plain``.

Pillow images through torchvision's transforms in two loader processes, networks eager in float32 and contiguous layout,
RLD as one writes it down, ``.item()`` and a progress bar in every step. It leaves the time of each step in a
file, and trains until it is killed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor

from rld_lightning.bench.jobs import write_time
from rld_lightning.bench.steps import plain_rld
from rld_lightning.data import CIFAR100DataModule, DigitsDataModule
from rld_lightning.models import create_model


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, augmented one by one.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        labels: int64 ``(N,)``.
        mean: of each channel, for values in [0, 1].
        std: likewise.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images = images.numpy()
        self.labels = labels.tolist()
        size = tuple(images.shape[1:3])
        self.transform = Compose(
            [RandomCrop(size, padding=4), RandomHorizontalFlip(), ToTensor(), Normalize(mean, std)]
        )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image ``(3, H, W)`` and its class."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train(data_name: str, root: str, teacher_name: str, student_name: str, batch: int, times: Path) -> None:
    """Trains until it is killed.

    Args:
        data_name: ``cifar100`` or ``digits``.
        root: folder of CIFAR-100.
        teacher_name: its network.
        student_name: its network.
        batch: images a step.
        times: a file that gets the time of each step.
    """
    torch.manual_seed(0)
    data = CIFAR100DataModule(root) if data_name == "cifar100" else DigitsDataModule()
    data.prepare_data()
    images = PillowImages(*data.read_split(train=True), data.mean, data.std)
    loader = DataLoader(images, batch, shuffle=True, num_workers=2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = create_model(teacher_name, data.num_classes).to(device).eval()
    student = create_model(student_name, data.num_classes).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    criterion = torch.nn.CrossEntropyLoss()
    while True:
        losses, accuracies = [], []
        for image, label in track(loader, description="training"):
            image, label = image.to(device), label.to(device)
            with torch.no_grad():
                soft = teacher(image)
            logits = student(image)
            loss = criterion(logits, label) + plain_rld(logits, soft, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            accuracies.append((logits.argmax(1) == label).float().mean().item())
            write_time(times)
        print(f"loss {np.mean(losses):.3f}, top-1 {100 * np.mean(accuracies):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("data", "root", "teacher", "student"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--times", type=Path, required=True)
    given = parser.parse_args()
    train(given.data, given.root, given.teacher, given.student, given.batch, given.times)
