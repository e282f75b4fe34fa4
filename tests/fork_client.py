"""Stands in for Python where a script is started: has `fork_server.py` fork a process for it, and is its deputy.

Installed beside the server's socket, as an executable. It ends as that process ends, and passes signals on to it;
if it is killed, the server kills the process. What is neither a script of the project nor torchrun goes to Python.
"""

import json
import os
import signal
import socket
import sys

HERE = os.path.dirname(os.path.abspath(sys.argv[0]))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Ask for a process with the arguments, folder, environment and standard streams of this one."""
    words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
    is_script = words and words[0].endswith(".py") and "site-packages" not in words[0]
    if not is_script and words[:2] != ["-m", "torch.distributed.run"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    request = {"words": words, "cwd": os.getcwd(), "environment": {**os.environ}, "umask": os.umask(0)}
    request["unbuffered"] = "-u" in sys.argv[:2]
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(HERE, "socket"))
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(data)
    answers = server.makefile()
    pid = int(answers.readline())
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
