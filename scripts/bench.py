"""Measure by ratio: `python scripts/bench.py loss` (RLD's time and memory), `python scripts/bench.py step`."""

import argparse

import torch

from rld_lightning.tasks.bench import bench_loss, bench_step

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    what = parser.add_subparsers(dest="what", required=True)
    loss = what.add_parser("loss", help="RLD forward and backward against the plain formula")
    loss.add_argument("--batch", type=int, default=1024)
    loss.add_argument("--classes", type=int, default=21841)
    step = what.add_parser("step", help="a training step against the plain eager float32 one")
    step.add_argument("--teacher", default="wrn_40_2")
    step.add_argument("--student", default="wrn_16_2")
    step.add_argument("--batch", type=int, default=64)
    step.add_argument("--size", type=int, default=32, help="height and width of the images")
    options = parser.parse_args()
    if options.what == "loss":
        bench_loss(options.batch, options.classes, options.device, options.rounds)
    else:
        shape = (3, options.size, options.size)
        bench_step(options.teacher, options.student, options.batch, shape, options.device, options.rounds)
