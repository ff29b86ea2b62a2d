"""What the tests of comparisons share."""

from concurrent.futures import ThreadPoolExecutor


class Threads(ThreadPoolExecutor):
    """Threads of this process in the place of processes that import torch."""

    def __init__(self, number, context, initializer, arguments):
        super().__init__(number)
