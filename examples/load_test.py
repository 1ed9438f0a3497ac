"""Bounded load on a server of this machine: latency, throughput, sizes of batches, and whether answers are right."""

import functools
import http.client
import io
import itertools
import json
import math
import statistics
import threading

import torch
import torch.nn.functional as F
from classifier import Answer, Classifier
from PIL import Image

from mambaout_kernels.benchmarking.latency import PERCENTS, drive, percentile

CLIENTS = (1, 2, 4, 8)
PICTURES = 16


@functools.cache
def picture(number: int) -> bytes:
    """A JPEG, or in turn a PNG, of coloured clouds, 320 x 240; the same for the same number."""
    clouds = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(number))
    pixels = F.interpolate(clouds, (240, 320), mode="bicubic").clamp(0, 1)[0].mul(255).byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, ("JPEG", "PNG")[number % 2])
    return file.getvalue()


def same(answer: list[dict], expected: list[dict]) -> bool:
    """The same classes, with probabilities that differ by roundings at most, as they may without compiled kernels."""
    pairs = [
        (a["index"] == b["index"], a["probability"], b["probability"]) for a, b in zip(answer, expected, strict=True)
    ]
    return all(equal and math.isclose(a, b, rel_tol=1e-3) for equal, a, b in pairs)


class Client:
    """Asks about pictures in turn, over a connection for each thread. RuntimeError for a wrong answer, or none."""

    def __init__(self, port: int, expected: list[Answer]):
        self.port, self.expected = port, expected
        self.numbers, self.local = itertools.count(), threading.local()
        self.batches: list[int] = []

    def ask(self) -> None:
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        number = next(self.numbers) % len(self.expected)
        self.local.connection.request("POST", "/classify", picture(number))
        response = self.local.connection.getresponse()
        content = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {content}")
        if not same(content["classes"], self.expected[number].classes):
            raise RuntimeError(f"picture {number}: {content['classes']}, not {self.expected[number].classes}")
        self.batches.append(content["batch"])


def load_test(port: int, classifier: Classifier, requests: int, seconds: float) -> int:
    """`requests` for each number of clients, for at most so many seconds each. Exit status."""
    expected = [classifier.answers([picture(number)])[0] for number in range(PICTURES)]
    headings = [f"p{percent}, ms" for percent in PERCENTS]
    print(*(f"{heading:>10}" for heading in ("clients", "requests", *headings, "images/s", "mean batch")))
    for clients in CLIENTS:
        client = Client(port, expected)
        found = drive(client.ask, clients, seconds, requests)
        times = " ".join(f"{percentile(found.seconds, percent) * 1e3:10.1f}" for percent in PERCENTS)
        batch = statistics.harmonic_mean(client.batches)  # each batch is in as many answers as it has pictures
        print(f"{clients:10} {found.answered:10} {times} {found.per_second:10.1f} {batch:10.2f}", flush=True)
    print("every answer was that of the model on the picture alone")
    return 0
