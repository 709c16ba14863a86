"""Runs launchers against the fake driver, in a process of its own: `python fake_launch.py DRIVER`.

Jobs on stdin and records on stdout are JSON. A job: {"library", "tensors", "scalars", "parameters", "calls"}, a call:
[tokens, splits, stream, device].

The test process itself must not load the fake, as torch may have the real driver there.
"""

import ctypes
import json
import sys


class Record(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("libraries", "attributes", "launches")),
        *((name, ctypes.c_int) for name in ("attribute", "attribute_value", "attribute_device")),
        *((name, ctypes.c_uint * 3) for name in ("grid", "block")),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint * 3),
        ("stream", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("parameters", ctypes.c_uint64 * 64),
        ("name", ctypes.c_char * 128),
        ("image", ctypes.c_ubyte * 16),
    )

    def plain(self):
        found = {name: getattr(self, name) for name, _ in self._fields_}
        return {name: list(value) if hasattr(value, "_length_") else value for name, value in found.items()} | {
            "name": self.name.decode()
        }


def run(driver, job):
    library = ctypes.CDLL(job["library"])
    launch = library.mhc_launch
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p)
    tensors = (ctypes.c_void_p * (len(job["tensors"]) + 1))(*job["tensors"])
    scalars = (ctypes.c_float * (len(job["scalars"]) + 1))(*job["scalars"])
    done = []
    for tokens, splits, stream, device in job["calls"]:
        status = {"status": None}
        if driver is not None:
            ctypes.c_int.in_dll(driver, "fake_parameters").value = job["parameters"]
            ctypes.c_int.in_dll(driver, "fake_device").value = device
            ctypes.c_int.in_dll(driver, "fake_failure").value = job.get("failure", 0)
        status["status"] = launch(tensors, scalars, tokens, splits, stream)
        record = Record.in_dll(driver, "fake").plain() if driver is not None else {}
        done.append(record | status)
    return done


if __name__ == "__main__":
    path = sys.argv[1]
    loaded = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) if path else None
    json.dump([run(loaded, job) for job in json.load(sys.stdin)], sys.stdout)
