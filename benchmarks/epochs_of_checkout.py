"""One side of `training_speed.py --against`: trains an epoch for each line on standard input.

    epochs_of_checkout.py CHECKOUT FOLDER CACHE_VIEWS FLAGS...

The epoch is that of the checkout's own benchmark, which knows its layout; FOLDER is for its files.
Each answer is the number of images.
"""

import sys
from pathlib import Path

checkout, folder, views, *flags = sys.argv[1:]
sys.path.insert(0, str(Path(checkout, "benchmarks")))

import training_speed

import train_model


def main() -> None:
    options = training_speed.epoch_parser(__doc__).parse_args(flags)
    config = training_speed.config_from(options, Path(folder), cache_views=int(views))
    data = training_speed.shorten(train_model.load_data(config), options.images)
    loop = training_speed.OurLoop(config, data, Path(folder))
    for _ in sys.stdin:
        print(loop.epoch(), flush=True)


if __name__ == "__main__":
    main()  # a function, so that the loop goes before Python waits for its workers
