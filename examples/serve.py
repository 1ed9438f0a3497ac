"""Serve image classification over HTTP with Ray Serve: requests that come together are computed as one batch.

    python examples/serve.py --weights mambaout_tiny --dtype bf16
    curl --data-binary @cat.jpg http://127.0.0.1:8000/classify
    python examples/serve.py --random mambaout_tiny --load-test 200

POST /classify takes a JPEG or PNG file and gives the likeliest classes; GET /health says that a replica answers. On
several machines: `ray start` on each, then --address auto (docs/serving.md).
"""

import argparse
import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from classifier import DTYPES, MOST_BYTES, Answer, BadImage, Classifier, classifier_of, load
from load_test import load_test, picture
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import mambaout_kernels as mk


class Server:
    """A replica: a process with the model and `threads` threads, which computes one batch at a time."""

    def __init__(self, args: argparse.Namespace):
        torch.set_num_threads(args.threads)
        self.variant = args.random or args.weights
        self.classifier = classifier(args)
        self.thread = ThreadPoolExecutor(1)  # batches, so that the event loop goes on collecting the next
        self.classify.set_max_batch_size(args.max_batch)
        self.classify.set_batch_wait_timeout_s(args.wait_ms / 1e3)
        for batch in (1, args.max_batch):  # the first calls allocate
            self.thread.submit(self.classifier.answers, [picture(0)] * batch).result()

    @serve.batch
    async def classify(self, bodies: list[bytes]) -> list[Answer | BadImage]:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.classifier.answers, bodies)

    async def __call__(self, request: Request) -> JSONResponse:
        route = request.method, request.url.path
        if route == ("GET", "/health"):
            return JSONResponse({"status": "ok", "model": self.variant})
        if route != ("POST", "/classify"):
            return refusal(404, "there are POST /classify and GET /health")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                return refusal(413, f"the body must have at most {MOST_BYTES} bytes")
        answer = await self.classify(bytes(body))
        if isinstance(answer, BadImage):
            return refusal(400, str(answer))
        return JSONResponse({"classes": answer.classes, "batch": answer.batch})


def refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def classifier(args: argparse.Namespace) -> Classifier:
    return classifier_of(load(args.weights, args.random, args.dtype), args.size, args.topk)


def start(args: argparse.Namespace) -> None:
    """Returns when all replicas answer."""
    if args.address is None:
        ray.init("local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    else:  # the other machines get these files; what they import has to be installed there
        ray.init(args.address, runtime_env={"working_dir": str(Path(__file__).parent)})
    serve.start(http_options={"host": args.host, "port": args.port})
    deployment = serve.deployment(
        Server,
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.threads},
        max_ongoing_requests=2 * args.max_batch,  # a batch that is computed, and the next
        max_queued_requests=args.most_waiting,  # beyond these, 503
    )
    serve.run(deployment.bind(args))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description="Serve a MambaOut over HTTP, with dynamic batching.")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", help="what from_pretrained takes: a file, a folder or a name")
    weights.add_argument(
        "--random", choices=list(mk.VARIANTS), metavar="VARIANT", help="random weights, for load tests"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--size", type=int, help="side of the square that the model sees; default: what the weights "
                        "were tested at, 224 for most")  # fmt: skip
    parser.add_argument("--topk", type=int, default=5, help="classes in an answer")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--wait-ms", type=float, default=5.0, help="how long a request waits for others")
    parser.add_argument("--replicas", type=int, default=1, help="processes with the model")
    parser.add_argument("--threads", type=int, help="of each; default: the cores divided by the replicas")
    parser.add_argument("--most-waiting", type=int, default=256, help="requests that wait; more are refused with 503")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a Ray cluster; auto: the one that this machine is in")
    parser.add_argument("--load-test", type=int, metavar="N",
                        help="send N requests at each of 1, 2, 4 and 8 at once, from here, and end")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20.0, help="of the load test, at most, for each of these")
    args = parser.parse_args(argv)
    for name in ("size", "topk", "max_batch", "replicas", "most_waiting"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.threads is None:
        args.threads = max(1, cores // args.replicas)
    if args.address is None and args.replicas * args.threads > cores:
        parser.error(f"--replicas times --threads must be at most the {cores} cores of this machine")
    if args.load_test is not None and (args.host != "127.0.0.1" or args.address is not None):
        parser.error("--load-test is for a server of this machine alone: without --host and --address")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        start(args)
        if args.load_test is not None:
            return load_test(args.port, classifier(args), args.load_test, args.seconds)
        print(f"serving {args.random or args.weights} at http://{args.host}:{args.port}/classify", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0
    finally:
        if args.address is not None:  # the cluster goes on
            serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
