"""A trainer like typical public distillation code, for comparison: ``python -m rld_lightning.bench.plain``.

Pillow images through torchvision's transforms in loader processes, eager networks in float32 and contiguous layout, the
plain formula of RLD, ``.item()`` and a progress bar in every step. It writes the time of each step to a file, and
trains until it is killed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from rld_lightning.bench.jobs import DATA, Job, write_time
from rld_lightning.bench.steps import plain_rld
from rld_lightning.data import CIFAR100DataModule, DigitsDataModule
from rld_lightning.data.streaming_module import IMAGENET_MEAN, IMAGENET_STD
from rld_lightning.models import create_model


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, augmented individually.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        labels: int64 ``(N,)``.
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
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
        """Returns an image ``(3, H, W)`` and its class."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def images_of(job: Job) -> Dataset[tuple[Tensor, int]]:
    """Returns the training images as public code reads them."""
    if job.data == "imagefolder":
        crop = [RandomResizedCrop(job.shape[1:]), RandomHorizontalFlip()]
        return ImageFolder(f"{job.root}/train", Compose([*crop, ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]))
    data = CIFAR100DataModule(job.root) if job.data == "cifar100" else DigitsDataModule()
    data.prepare_data()
    return PillowImages(*data.read_split(train=True), data.mean, data.std)


def train(job: Job, times: Path) -> None:
    """Trains until it is killed."""
    torch.manual_seed(0)
    loader = DataLoader(images_of(job), job.batch, shuffle=True, num_workers=job.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = create_model(job.teacher, job.classes).to(device).eval()
    student = create_model(job.student, job.classes).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    criterion, file = torch.nn.CrossEntropyLoss(), times.open("a", buffering=1)
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
            write_time(file)
        print(f"loss {np.mean(losses):.3f}, top-1 {100 * np.mean(accuracies):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=DATA, required=True)
    for option in ("root", "teacher", "student"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("batch", "workers"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--times", type=Path, required=True)
    options = vars(parser.parse_args())
    times = options.pop("times")
    train(Job(**options), times)
