"""Is `python ARGUMENTS`, begun as a fork of the warm server: `python -SE tests/warm.py ARGUMENTS`.

This process stands for the command: it has its streams and its exit code, and when it is killed the command is too. Without
a server, or in an environment that the server's libraries were not imported in, it becomes the command itself.
"""

import json
import os
import signal
import socket
import struct
import sys

arguments = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as connection:
    if "WARM_SERVER" in os.environ:
        connection.connect(os.environ["WARM_SERVER"])
        environment = dict(os.environ)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": environment}
        body = json.dumps(request).encode()
        socket.send_fds(connection, [struct.pack("<I", len(body))], [0, 1, 2])
        connection.sendall(body)
        if connection.recv(1) == b"y":
            (status,) = struct.unpack("<i", connection.recv(4))
            if os.WIFSIGNALED(status):
                signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
                os.kill(os.getpid(), os.WTERMSIG(status))
            os._exit(os.WEXITSTATUS(status))
os.execv(sys.executable, [sys.executable, *arguments])
