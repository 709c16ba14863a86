"""Runs launchers against the fake driver, in a process of its own: `python fake_launch.py DRIVER`.

Jobs on stdin and records on stdout are JSON. A job: {"library", "tensors", "scalars", "parameters",
"workspace", "calls"}, a call:
[tokens, stream, device].

The test process itself must not load the fake, as torch may have the real driver there.
"""

import ctypes
import json
import sys


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint * 3),
        ("overlaps", ctypes.c_int),
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


def run(driver, job):
    library = ctypes.CDLL(job["library"])
    launch, workspace = library.mhc_launch, library.mhc_workspace
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    workspace.argtypes, workspace.restype = (ctypes.c_int64,), ctypes.c_int64
    tensors = (ctypes.c_void_p * (len(job["tensors"]) + 1))(*job["tensors"])
    scalars = (ctypes.c_float * (len(job["scalars"]) + 1))(*job["scalars"])
    done = []
    for tokens, stream, device in job["calls"]:
        before = 0
        if driver is not None:
            counts = (Count * 32)(*(Count(name.encode(), count) for name, count in job["parameters"].items()))
            ctypes.memmove((Count * 32).in_dll(driver, "fake_counts"), counts, ctypes.sizeof(counts))
            ctypes.c_int.in_dll(driver, "fake_device").value = device
            ctypes.c_int.in_dll(driver, "fake_failure").value = job.get("failure", 0)
            before = Record.in_dll(driver, "fake").launches
        status = {"status": launch(tensors, scalars, tokens, stream, job["workspace"]), "bytes": workspace(tokens)}
        record = Record.in_dll(driver, "fake") if driver is not None else None
        log = [plain(record.log[number % 64]) for number in range(before, record.launches)] if record else []
        done.append((plain(record) if record else {}) | status | {"log": log})
    return done


if __name__ == "__main__":
    path = sys.argv[1]
    loaded = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None
    json.dump([run(loaded, job) for job in json.load(sys.stdin)], sys.stdout)
