"""Measure speed relative to a plain loop: `fit` (whole jobs), `step`, `losses`, `data` (JPEGs) and others."""

import argparse
from pathlib import Path

from rld_lightning.package_files import script_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=script_command("bench"), description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed, alternately")
    what = parser.add_subparsers(dest="what", required=True)
    fit = what.add_parser("fit", help="whole jobs of fit.py against a plain trainer like public distillation code")
    fit.add_argument("--data", default="cifar100", choices=("cifar100", "digits", "imagefolder"))
    fit.add_argument(
        "--root", default="data", help="folder of CIFAR-100, or of images, made in ImageNet's size if it is missing"
    )
    fit.add_argument("--workers", type=int, default=2, help="dataloader workers of the plain trainer")
    fit.add_argument("--seconds", type=float, default=4, help="time of each per round")
    fit.add_argument("--folder", type=Path, help="folder that keeps the teacher and its logits for the next call")
    fit.add_argument("--prepare", type=int, metavar="STEPS", help="only fill --folder and compile, in this many steps")
    fit.add_argument(
        "--with",
        dest="switches",
        action="append",
        default=[],
        help="overrides of one fit.py job; repeat for several jobs",
    )
    fit.add_argument("--report", type=Path, help="also write the results to this file as JSON")
    what.add_parser("startup", help="seconds of --help, of a run's first step, of a sweep's trial")
    what.add_parser("overhead", help="Python overhead of a step in a loop, in Lightning and in fit.py")
    loss = what.add_parser("loss", help="RLD forward and backward against the plain formula")
    loss.add_argument("--batch", type=int, default=1024)
    loss.add_argument("--classes", type=int, default=21841)
    step = what.add_parser("step", help="a training step against the plain eager float32 one")
    epoch = what.add_parser("epoch", help="overhead of an epoch of fit.py besides its steps")
    epoch.add_argument("--root", default="data", help="folder of CIFAR-100")
    epoch.add_argument("--epochs", type=int, default=4)
    losses = what.add_parser("losses", help="a training step with each loss relative to kd's")
    losses.add_argument("names", nargs="*", help="losses such as rld or [rld,at]; none for all")
    for steps, teacher, student in (
        (fit, "wrn40_2", "wrn16_2"),
        (step, "wrn40_2", "wrn16_2"),
        (epoch, "wrn40_2", "wrn16_2"),
        (losses, "resnet20", "resnet8"),
    ):
        steps.add_argument("--teacher", default=teacher)
        steps.add_argument("--student", default=student)
        steps.add_argument("--batch", type=int, default=64)
        if steps not in (fit, epoch):
            steps.add_argument("--size", type=int, default=32, help="height and width of the images")
    data = what.add_parser("data", help="JPEG files to training crops on one core, against the usual Pillow pipeline")
    data.add_argument("--images", type=int, default=64)
    data.add_argument("--width", type=int, default=500)
    data.add_argument("--height", type=int, default=375)
    data.add_argument("--quality", type=int, default=90)
    data.add_argument("--size", type=int, default=224, help="height and width of the crops")
    options = parser.parse_args()
    if options.what == "fit" and options.prepare and options.folder is None:
        parser.error("--prepare needs --folder")

    import torch  # slow, so not for help and mistakes

    from rld_lightning.bench.data import bench_data, write_image_folder
    from rld_lightning.bench.epochs import bench_epoch
    from rld_lightning.bench.jobs import Job, bench_fit, prepare_fit
    from rld_lightning.bench.overhead import bench_overhead
    from rld_lightning.bench.startup import bench_startup
    from rld_lightning.bench.steps import bench_loss, bench_losses, bench_step, configured_losses
    from rld_lightning.hydra.script import exit_on_user_error
    from rld_lightning.runs.folder import check_folder

    with exit_on_user_error():
        if getattr(options, "report", None) is not None:
            check_folder(options.report.parent, "--report", written=(options.report.name,))
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.what == "data":
            bench_data(options.images, options.width, options.height, options.quality, options.size, options.rounds)
        elif options.what == "fit":
            if options.data == "imagefolder":
                write_image_folder(Path(options.root))
            job = Job(options.data, options.root, options.teacher, options.student, options.batch, options.workers)
            if options.prepare:
                prepare_fit(job, options.prepare, options.switches, options.folder)
            else:
                bench_fit(job, options.rounds, options.seconds, options.switches, options.folder, options.report)
        elif options.what == "startup":
            bench_startup(options.rounds)
        elif options.what == "overhead":
            bench_overhead(device, options.rounds)
        elif options.what == "epoch":
            bench_epoch(options.root, options.teacher, options.student, options.batch, options.epochs)
        elif options.what == "loss":
            bench_loss(options.batch, options.classes, device, options.rounds)
        else:
            pair = (options.teacher, options.student, options.batch, (3, options.size, options.size))
            if options.what == "step":
                bench_step(*pair, device, options.rounds)
            else:
                bench_losses(configured_losses(options.names), *pair, device, options.rounds)
