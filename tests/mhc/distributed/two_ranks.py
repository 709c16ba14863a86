"""Two ranks (gloo) that serve the tests: started once, each test is a function they both run.

A rank's error is shown by the test that asked. Where a rank hangs or dies, both processes are ended with all that
they started, and the next test gets fresh ones.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

WORLD = 2
PATIENCE = 120  # seconds for one function, on a busy machine too
GRACE = 2  # seconds for the other rank once one has failed


class RankFailed(Exception):
    """What went wrong on a rank, with its traceback."""


class Ranks:
    """`WORLD` processes that run functions of test files; `folder` is for what they leave behind."""

    def __init__(self, folder):
        self.folder, self.processes, self.calls = folder, [], 0

    def run(self, function, *arguments, patience=PATIENCE):
        """`function(*arguments)` on every rank, in a fresh process group -> what each returned (JSON).

        The function stands at the top level of its file. Raises `RankFailed`.
        """
        if not self.processes:
            self.start()
        self.calls += 1
        meeting = f"file://{self.folder / f'meeting {self.calls}'}"
        order = json.dumps([function.__code__.co_filename, function.__name__, arguments, meeting])
        for process in self.processes:
            process.stdin.write(order + "\n")
            process.stdin.flush()
        answers = self.answers(patience)
        failed = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if answer["error"]]
        if failed:
            self.end()
            raise RankFailed("\n".join(failed))
        return [answer["value"] for answer in answers]

    def start(self):
        variables = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "MHC_TUNE_CACHE": str(self.folder / "cache"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank)],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(WORLD)
        ]

    def answers(self, patience):
        answers = [{"error": f"no answer within {patience} s"} for _ in self.processes]
        waiting = {process.stdout: rank for rank, process in enumerate(self.processes)}
        until = time.monotonic() + patience
        while waiting and (ready := select.select(list(waiting), [], [], max(0, until - time.monotonic()))[0]):
            for stream in ready:
                rank = waiting.pop(stream)
                line = stream.readline()
                answers[rank] = json.loads(line) if line else {"error": "the process died"}
                if answers[rank]["error"]:
                    until = min(until, time.monotonic() + GRACE)
        return answers

    def end(self):
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.communicate()
        self.processes = []


def serve(rank):
    """Run what standard input names, a line each; answers go to standard output, and all that is printed to errors."""
    import torch
    import torch.distributed as dist

    import mhc

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    files = {}
    for line in sys.stdin:
        file, name, arguments, meeting = json.loads(line)
        answer = {"error": None, "value": None}
        try:
            if file not in files:
                files[file] = loaded(file)
            with warnings.catch_warnings(), mhc.using(mhc.Kernels.reference()):
                warnings.simplefilter("error")
                dist.init_process_group(
                    "gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE)
                )
                torch.manual_seed(0)
                answer["value"] = getattr(files[file], name)(*arguments)
                dist.barrier()  # nobody leaves while the other still connects
            dist.destroy_process_group()
        except BaseException:
            answer["error"] = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def loaded(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(int(sys.argv[1]))
