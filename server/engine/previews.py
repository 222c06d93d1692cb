"""The thread that draws previews next to the steps."""

import logging
import threading
from collections.abc import Callable

from server.engine.events import Observe, Preview, PreviewDropped
from server.engine.interface import AnyModel, TrajectoryLike
from server.engine.job import Job, JobCall

log = logging.getLogger(__name__)


class Previews:
    """Draws previews on a thread of its own. It never delays a step: only the newest state of each image waits."""

    def __init__(self, deliver: Callable[[Job, Preview], None], observe: Observe) -> None:
        self._deliver = deliver
        self._observe = observe
        self._waiting: dict[tuple[Job, int], tuple[int, TrajectoryLike]] = {}
        self._changed = threading.Condition()
        self._stopping = False

    def start(self, model: AnyModel) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, args=(model,), name="previews", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop drawing and join the thread. A thread that still runs while the process exits can abort the process."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def offer(self, job: Job, call: JobCall) -> None:
        """Draw a preview of each image of an expert's call, if one is due after this call."""
        interval = job.submission.preview_interval
        if call.trajectories and interval and call.expert_calls % interval == 0:
            with self._changed:
                for index, trajectory in enumerate(call.trajectories, call.index):
                    if (job, index) in self._waiting:
                        self._observe(PreviewDropped())
                    self._waiting[job, index] = call.expert_calls, trajectory
                self._changed.notify()

    def discard(self, job: Job) -> None:
        """Drop the previews of a job that wait to be drawn."""
        with self._changed:
            for waiting in [each for each in self._waiting if each[0] is job]:
                del self._waiting[waiting]
                self._observe(PreviewDropped())

    def _run(self, model: AnyModel) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                job, index = next(iter(self._waiting))
                step, trajectory = self._waiting.pop((job, index))
            try:
                pixels = model.preview(trajectory)
            except Exception:  # noqa: BLE001  # a failed preview must not fail its image
                job.run_in_context(log.exception, "%s: no preview of image %d", job.submission.name, index)
                continue
            self._deliver(job, Preview(index, step, len(trajectory.stages), pixels))
