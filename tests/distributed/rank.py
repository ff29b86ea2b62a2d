"""What torchrun starts on each rank: the main function of a module of this folder. Usage: rank.py MODULE [ARGUMENT...]"""

import gc
import importlib
import sys


def main(module: str, *arguments: str) -> None:
    importlib.import_module("tests.conftest")  # offline, one thread
    run = importlib.import_module(f"tests.distributed.{module}")
    # Each training collects twice, and spends more on looking through what is imported than on its updates.
    gc.freeze()
    run.main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
