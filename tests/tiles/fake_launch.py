"""Runs launchers against the fake driver, in a process of its own: `python fake_launch.py DRIVER`.

Jobs on stdin and records on stdout are JSON. A job: {"library", "tensors", "scalars", "parameters", "workspace",
"calls"}, a call: {"tokens", "stream", "device", "context", "thread", "failure", "capturing"}: the tensors' device, that
of the thread's context (negative: none), whether the thread is a fresh one, and what the driver does. A call of no
tokens (null) loads the kernels.

The test process itself must not load the fake, as torch may have the real driver there.
"""

import ctypes
import json
import sys
from threading import Thread


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint * 3),
        *((name, ctypes.c_int) for name in ("overlaps", "device")),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.c_uint64 * 64),
        ("name", ctypes.c_char * 128),
    )


class Count(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 128), ("parameters", ctypes.c_int))


class Record(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("libraries", "attributes", "launches")),
        *((name, ctypes.c_int) for name in ("attribute", "attribute_value", "attribute_device")),
        ("image", ctypes.c_ubyte * 16),
        ("log", Launch * 64),
    )


def plain(record):
    """A structure's fields, but for the log, in JSON's types."""
    found = {name: getattr(record, name) for name, _ in record._fields_ if name != "log"}
    found = {name: list(value) if hasattr(value, "_length_") else value for name, value in found.items()}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def call(driver, library, job, given):
    """The status of one call, and the device of the thread's context after it."""
    tensors = (ctypes.c_void_p * (len(job["tensors"]) + 1))(*job["tensors"])
    scalars = (ctypes.c_float * (len(job["scalars"]) + 1))(*job["scalars"])
    if driver is not None:
        driver.fake_enter(given["context"])
    if given["tokens"] is None:
        status = library.mhc_load(given["device"])
    else:
        stream, space = given["stream"], job["workspace"]
        status = library.mhc_launch(tensors, scalars, given["tokens"], stream, space, given["device"])
    return {"status": status, "context": driver.fake_current() if driver is not None else None}


def in_fresh_thread(function, *arguments):
    found = []
    thread = Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


def run(driver, job):
    library = ctypes.CDLL(job["library"])
    launch, workspace = library.mhc_launch, library.mhc_workspace
    launch.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 2, ctypes.c_int32)
    workspace.argtypes, workspace.restype = (ctypes.c_int64,), ctypes.c_int64
    done = []
    for given in job["calls"]:
        before = 0
        if driver is not None:
            counts = (Count * 32)(*(Count(name.encode(), count) for name, count in job["parameters"].items()))
            ctypes.memmove((Count * 32).in_dll(driver, "fake_counts"), counts, ctypes.sizeof(counts))
            ctypes.c_int.in_dll(driver, "fake_failure").value = given["failure"]
            ctypes.c_int.in_dll(driver, "fake_capturing").value = given["capturing"]
            before = Record.in_dll(driver, "fake").launches
        arguments = (driver, library, job, given)
        status = in_fresh_thread(call, *arguments) if given["thread"] else call(*arguments)
        status["bytes"] = workspace(given["tokens"] or 0)
        record = Record.in_dll(driver, "fake") if driver is not None else None
        log = [plain(record.log[number % 64]) for number in range(before, record.launches)] if record else []
        done.append((plain(record) if record else {}) | status | {"log": log})
    return done


if __name__ == "__main__":
    path = sys.argv[1]
    loaded = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None
    json.dump([run(loaded, job) for job in json.load(sys.stdin)], sys.stdout)
