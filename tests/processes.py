"""A Python that has torch and timm imported from its first line, for tests that need a process of their own: to import
them takes up to eight seconds.

`python()` is the path of a program that takes what python takes. One process for each run of pytest imports them and
does nothing else; every call is a fork of it, with the caller's files, folder, environment and signals. Where an
import itself is tested, the memory of a process, or what libraries read from the environment when they are loaded, a
test runs sys.executable instead.
"""

import functools
import json
import os
import signal
import socket
import struct
import sys
from select import select

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # which are passed on


@functools.cache
def python() -> str:
    import fcntl
    import tempfile

    if not sys.platform.startswith("linux"):  # files in messages, and os.pidfd_open
        return sys.executable
    run_of_workers = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run_of_workers is None:
        return _started(tempfile.mkdtemp(), os.getpid())
    folder = os.path.join(tempfile.gettempdir(), f"python-{run_of_workers}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        program = os.path.join(folder, "python")
        return program if os.path.exists(program) else _started(folder, os.getppid())


def _started(folder: str, owner: int) -> str:
    """The program, whose server ends, and removes the folder, when the process `owner` has ended."""
    import shlex
    import subprocess

    program, address = (os.path.join(folder, name) for name in ("python", "socket"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    file = str(listener.fileno())
    words = [sys.executable, __file__, "serve", program, file, str(owner)]
    subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=[int(file)])
    words = [sys.executable, "-IS", __file__, "call", address]
    with open(program, "w", opener=lambda path, flags: os.open(path, flags, mode=0o700)) as text:
        text.write(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    return program


def call(address: str, arguments: list[str]) -> None:
    """Has the server run this, and ends as it does."""
    if arguments[:1] == ["-u"]:
        arguments, os.environ["PYTHONUNBUFFERED"] = arguments[1:], "1"
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-c", "-m")):
        os.execv(sys.executable, [sys.executable, *arguments])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [struct.pack("q", len(request))], [0, 1, 2])
    connection.sendall(request)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    for file in (0, 1, 2):  # so that whoever reads or writes notices the end of the other
        os.close(file)
    status = int(connection.recv(16))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(program: str, listener: socket.socket, owner: int) -> list[str]:
    """Returns in forked processes only: what they have to run."""
    import gc
    import shutil
    from contextlib import suppress

    ended = os.pidfd_open(owner)
    import torch._dynamo  # noqa: F401 (which every optimizer imports)

    with suppress(ImportError):
        import timm  # noqa: F401
    gc.freeze()  # what forks do not write to is not copied
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select([listener, ended], [], [])
        if ended in ready:
            shutil.rmtree(os.path.dirname(program))
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return supervised(connection)
        connection.close()


def supervised(connection: socket.socket) -> list[str]:
    """The same in a fork, whose end is told; if the caller ends, so does it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        arguments, folder, environment = json.loads(stream.read(*struct.unpack("q", length)))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return arguments
    for file in (0, 1, 2, *files):
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in select([ended, connection], [], [])[0]:
        numbers = connection.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(child, number)
        if not numbers:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(str(status).encode())
    os._exit(0)


def run(arguments: list[str]) -> None:
    """As python does with these; what starts sys.executable in turn starts a fork as well."""
    import runpy
    import types

    import torch

    sys.executable = sys.argv[2]
    by_line = 1 if os.environ.get("PYTHONUNBUFFERED") else -1
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", by_line), open(2, "w", 1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # libraries have read it already
        torch.set_num_threads(int(threads))
    kind, *rest = arguments
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = "" if kind in ("-c", "-m") else os.path.dirname(os.path.realpath(kind))
    sys.path[:1] = [first, *filter(None, paths)]
    sys.argv = arguments if kind not in ("-c", "-m") else [kind, *rest[1:]]
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        main.__file__ = os.path.abspath(kind)
        with open(kind, "rb") as file:
            exec(compile(file.read(), kind, "exec"), main.__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "call":
        call(sys.argv[2], sys.argv[3:])
    run(serve(sys.argv[2], socket.socket(fileno=int(sys.argv[3])), int(sys.argv[4])))
