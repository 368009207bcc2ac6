"""A real redis-server for the tests: its own free port of the loopback, its own folder.

It keeps nothing unless it is told to (`appendonly`, `save`), can be stopped, killed, paused and
started again on the same port and folder, and is ended with the `with` that it was made in.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kit.harness import PATIENCE_S, wait_until

_ATTEMPTS = 5  # another program may take the free port before Redis does


class RedisServer:
    """redis-server, ready to answer; `options` are further settings, written `name=value`.

    An underscore in the name of an option stands for the hyphen in Redis' own: maxmemory_policy.
    """

    def __init__(
        self,
        appendonly: bool = False,
        appendfsync: str = "always",
        save: str = "",
        password: str = "",
        **options: str,
    ) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is missing, the tests need it: apt-get install redis-server"
        self._program = program
        self._folder = tempfile.TemporaryDirectory(prefix="counter-redis-")
        self.folder = Path(self._folder.name)
        self.password = password
        self._options = {
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            "save": save,
            **({"requirepass": password} if password else {}),
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        self.process: subprocess.Popen[bytes] | None = None
        try:
            for attempt in range(_ATTEMPTS):
                self.port = free_port()
                try:
                    self.start()
                    break
                except AssertionError:
                    if attempt + 1 == _ATTEMPTS or "Address already in use" not in self.log():
                        raise
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None, "Redis does not run"
        return self.process.pid

    def url(self, key: str | None = None, db: int = 0, user: str = "", password: str = "") -> str:
        """What --store takes for a key of this server."""
        password = password or self.password
        access = f"{user}:{quote(password, safe='')}@" if password else ""
        query = f"?key={quote(key, safe='')}" if key is not None else ""
        return f"redis://{access}{self.address}/{db}{query}"

    def start(self) -> None:
        """Starts it, on its port and with what its folder holds; ready when this comes back."""
        assert self.process is None, "Redis runs already"
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--daemonize", "no"]
        for name, value in self._options.items():
            command += [f"--{name}", value]
        # Not by --logfile, which knows nothing of what is wrong with the settings themselves.
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_until(self._answers, f"redis-server answers on port {self.port}")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ends it in order: what it is set to write, it writes."""
        assert self.process is not None, "Redis does not run"
        self.resume()
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self.process = None

    def kill(self) -> None:
        """Ends it by SIGKILL."""
        assert self.process is not None, "Redis does not run"
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process = None

    def pause(self) -> None:
        """Stops it from answering without ending it; its connections stay open."""
        assert self.process is not None, "Redis does not run"
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Has it go on after pause(); without effect if it does."""
        assert self.process is not None, "Redis does not run"
        self.process.send_signal(signal.SIGCONT)

    def ask(self, *command: Any, db: int = 0) -> Any:
        """One command on a connection of its own; gives back what redis-py makes of the reply."""
        with redis.Redis(
            host="127.0.0.1",
            port=self.port,
            db=db,
            password=self.password or None,
            socket_timeout=PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            return client.execute_command(*command)

    def log(self) -> str:
        """What Redis has said, over all its starts."""
        path = self.folder / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Ends it if it runs, and removes its folder."""
        if self.process is not None:
            self.kill()
        self._folder.cleanup()

    def _answers(self) -> bool:
        """Whether it serves: not while it loads what it kept."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"redis-server ended as it started:\n{self.log()}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as sock:
                sock.sendall(b"PING\r\n")
                return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, *_: object) -> None:
        if error is not None:
            sys.stderr.write(self.log())
        self.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
