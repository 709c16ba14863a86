"""The C function that every CPU kernel exports: it cuts the tokens into slices and runs one slice a thread.

Token-shaped arguments are offset to the slice's first token, partials to the slice's own row, everything else is
shared. OpenMP's symbols are left undefined on purpose: the library is loaded into a process where torch has brought
its own OpenMP runtime, so kernels and torch share one pool of threads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tiles.kernels.spec import TOKENS, Argument

ENTRY = "mhc_launch"

_SIGNATURE = re.compile(r"int32_t (\w+_kernel)\(([^)]*)\)")


def with_launcher(source: str, arguments: Sequence[Argument]) -> str:
    """TileLang's C code with restrict-qualified parameters, followed by the launcher for `arguments`."""
    match = _SIGNATURE.search(source)
    assert match, "TileLang's C code starts with the kernel's prototype"
    name, parameters = match.groups()
    source = source.replace(parameters, parameters.replace("* ", "* __restrict__ "))
    called = [parameter.split()[-1] for parameter in parameters.split(", ")]
    return f"{source}\n{_launcher(name, called, arguments)}"


def _launcher(kernel: str, parameters: Sequence[str], arguments: Sequence[Argument]) -> str:
    passed = {TOKENS: "(int32_t)(last - first)", "splits": "1"}
    tensors = [argument for argument in arguments if not argument.is_scalar]
    scalars = [argument for argument in arguments if argument.is_scalar]
    for index, argument in enumerate(tensors):
        row = argument.nbytes(1)
        if argument.role == "partial":
            offset = f" + slice * (int64_t){row}"
        elif TOKENS in argument.shape:
            offset = f" + first * (int64_t){row}"
        else:
            offset = ""
        ctype = "float" if argument.dtype == "float32" else "uint16_t"
        passed[argument.name] = f"({ctype} *)((char *)tensors[{index}]{offset})"
    for index, argument in enumerate(scalars):
        passed[argument.name] = f"scalars[{index}]"
    call = ",\n        ".join(passed[parameter] for parameter in parameters)
    return f"""
extern "C" int32_t {ENTRY}(void **tensors, const float *scalars, int64_t tokens, int32_t slices) {{
  int32_t failed = 0;
#pragma omp parallel for num_threads(slices) schedule(static, 1) reduction(| : failed)
  for (int32_t slice = 0; slice < slices; ++slice) {{
    const int64_t first = tokens * slice / slices, last = tokens * (slice + 1) / slices;
    failed |= {kernel}(
        {call});
#if defined(__SSE2__)
    _mm_sfence();  // what went past the caches is there for other threads
#endif
  }}
  return failed;
}}
"""
