"""Is `python ARGUMENTS`, begun as a fork of the warm server: `python -SE tests/warm.py ARGUMENTS`.

This process stands for the command: it passes streams and signals on and has its exit code, and when it is killed the
command is too. Without a server, or where the environment asks for libraries that are imported otherwise, it becomes the
command itself.
"""

import json
import os
import resource
import signal
import socket
import struct
import sys

arguments = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as connection:
    if os.environ.get("WARM_SERVER"):
        connection.connect(os.environ["WARM_SERVER"])
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        body = json.dumps(request | {"largest_file": resource.getrlimit(resource.RLIMIT_FSIZE)}).encode()
        socket.send_fds(connection, [struct.pack("<I", len(body))], [0, 1, 2])
        connection.sendall(body)
        if connection.recv(1) == b"y":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
            (status,) = struct.unpack("<i", connection.recv(4))
            if os.WIFSIGNALED(status):
                signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
                os.kill(os.getpid(), os.WTERMSIG(status))
            os._exit(os.WEXITSTATUS(status))
os.execv(sys.executable, [sys.executable, *arguments])
