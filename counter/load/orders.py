"""The life of a load process: it begins, loads and ends as its parent says over their pipe.

    parent   go, stop, cut, finish: words
    process  (before, total), (ready, -), (progress, result)..., (loaded, result), (result, result);
             (failed, error) instead of the first where the server cannot be asked, or this
             process lacks what it needs

The first process reads the total before and after the run; nobody else may have sent meanwhile.
When the parent is gone its pipe ends, and so does the process.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from multiprocessing.connection import Connection as PipeEnd
from typing import Final

from gevent.event import Event

from counter.load.process import LoadProcess
from counter.load.recording import Recording
from counter.load.share import Share
from counter.system.libev import READ, choose_libev

PROGRESS_S: Final = 0.5  # between two results so far


def live(share: Share, pipe: PipeEnd, is_first: bool, recording: Recording | None) -> None:
    """The life of a load process, from its fork to its end; does not return."""
    code = 1
    try:
        try:
            choose_libev()
            process = LoadProcess(share, recording)
            orders = _Orders(process, pipe)
            total_before = process.read_total() if is_first else None
        except (OSError, EOFError) as error:
            pipe.send(("failed", error))
            return
        if is_first:
            pipe.send(("before", total_before))
        process.open_all()
        pipe.send(("ready", None))
        orders.go.wait()
        orders.report_progress()
        process.run()
        orders.stop_reporting()
        process.close()
        if recording:
            recording.write()
        pipe.send(("loaded", process.result))
        orders.finish.wait()
        if is_first:
            # With the run's own connections closed there is a worker for this one.
            with contextlib.suppress(OSError, EOFError):
                process.result.total_after = process.read_total()
        pipe.send(("result", process.result))
        code = 0
    except BrokenPipeError:
        pass  # the parent is gone, and nobody waits for a result
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Orders:
    """The parent's words, as events; its death ends the process."""

    def __init__(self, process: LoadProcess, pipe: PipeEnd) -> None:
        self.go, self.finish = Event(), Event()
        self._process = process
        self._pipe = pipe
        self._listening = process.loop.io(pipe.fileno(), READ)
        self._listening.start(self._on_word)
        self._reporting = process.loop.timer(PROGRESS_S, PROGRESS_S)

    def report_progress(self) -> None:
        """Has the parent told of the result so far, again and again."""
        self._reporting.start(lambda: self._pipe.send(("progress", self._process.so_far())))

    def stop_reporting(self) -> None:
        """Tells of no further result so far."""
        self._reporting.close()

    def _on_word(self) -> None:
        try:
            word = self._pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if word == "stop":
            self._process.stop()
        elif word == "cut":
            self._process.cut()
        else:
            (self.go if word == "go" else self.finish).set()
