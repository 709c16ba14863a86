"""Calls one launcher on the emulator, in a process of its own: `python emulated_child.py`, the job as JSON on stdin.

A job: {"driver", "library", "seed", "late", "counted", "memory", "tensors", "workspace", "workspace_bytes", "scalars",
"tokens"}.
A tensor is [name, offset, bytes, writable, overlapping], in the file `memory` or in the workspace. Results are left in
the file. A finding ends the process. What was `counted` is printed (emulator/traffic.h).
"""

import ctypes
import json
import mmap
import sys

GUARD = 1 << 16
"""Bytes around the workspace that belong to nobody."""


def run(job):
    driver = ctypes.CDLL(job["driver"], mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(job["library"])
    driver.emulated_begin.argtypes = (ctypes.c_uint64, ctypes.c_int)
    driver.emulated_tensor.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
    pointer = ctypes.c_void_p
    library.mhc_launch.argtypes = (pointer, pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int32)
    library.mhc_workspace.argtypes, library.mhc_workspace.restype = (ctypes.c_int64,), ctypes.c_int64
    driver.emulated_begin(job["seed"], job["late"])
    with open(job["memory"], "r+b") as file:  # noqa: PTH123  (pathlib takes longer to import than all the rest)
        memory = mmap.mmap(file.fileno(), 0)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert library.mhc_workspace(job["tokens"]) == job["workspace_bytes"]
    space = mmap.mmap(-1, job["workspace_bytes"] + 2 * GUARD)
    space[:] = b"\xff" * len(space)
    workspace = ctypes.addressof(ctypes.c_char.from_buffer(space)) + GUARD
    for base, places in ((start, job["tensors"]), (workspace, job["workspace"])):
        for name, offset, size, writable, overlapping in places:
            driver.emulated_tensor(name.encode(), base + offset, size, writable, overlapping)
    tensors = (ctypes.c_void_p * (len(job["tensors"]) + 1))(*(start + place[1] for place in job["tensors"]))
    scalars = (ctypes.c_float * (len(job["scalars"]) + 1))(*job["scalars"])
    if job["counted"]:
        driver.emulated_count_traffic()
    status = library.mhc_launch(tensors, scalars, job["tokens"], None, workspace, 0)
    if job["counted"]:
        driver.emulated_tell_traffic()
    return status


if __name__ == "__main__":
    sys.exit(run(json.load(sys.stdin)))
