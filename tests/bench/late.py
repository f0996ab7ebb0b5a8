#!/usr/bin/env python3
"""Does a server send all that it owes to a client that reads late?

The client asks for twenty large values in one go, and reads half a second
later. Printed is how many bytes of the replies are missing: it should be 0.

Start it:  python3 late.py SERVER
"""

import contextlib
import sys
import time

from harness import TIMEOUT, Failed, Line, encode, run, started

VALUE = "v" * 900_000
TIMES = 20
PATIENCE = 2  # seconds without another byte: the rest will not come


def main():
    if len(sys.argv) != 2:
        raise Failed("it takes a server")
    left = len("+OK\r\n") + TIMES * len(f"$900000\r\n{VALUE}\r\n")
    with started(sys.argv[1], TIMEOUT) as server:
        with Line(server, PATIENCE) as line:
            line.send("SET", "big", VALUE)
            line.socket.sendall(encode("GET", "big") * TIMES)
            time.sleep(0.5)
            with contextlib.suppress(OSError):  # no more within PATIENCE
                while left and (data := line.socket.recv(65536)):
                    left -= len(data)
    print(left, "bytes of the replies are missing")


if __name__ == "__main__":
    run(main)
