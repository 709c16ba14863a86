"""Text in nvdisasm's form, written for the tests: a kernel's section around a few instructions."""

from autotune.sass.code import Code, read_code


def printed(body: str, name: str = "toy", registers: int = 32, shared: int = 1024) -> str:
    """A cubin of one kernel: each line of `body` is an instruction, or a label with a colon."""
    lines = [f'\t.section\t.text.{name},"ax",@progbits', "\t.align\t128", f"{name}:", f".text.{name}:"]
    address = 0
    for line in filter(None, map(str.strip, body.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    info = ["//----- nvinfo : EIATTR_REGCOUNT", "\t.align\t\t4", "        /*0000*/ \t.byte\t0x04, 0x2f", ".L_9:"]
    info += [f"        /*0004*/ \t.word\tindex@({name})", f"        /*0008*/ \t.word\t{registers:#010x}"]
    sections = ['\t.section\t.nv.info,"",@"SHT_CUDA_INFO"', *info, "", *lines]
    sections += [f'\t.section\t.nv.shared.{name},"aw",@nobits', "\t.align\t1024", f"\t.zero\t\t{shared}"]
    return "\n".join(["\t.target\tsm_90a", *sections, ""])


def code_of(body: str) -> Code:
    """The code of one kernel."""
    return read_code(printed(body))["toy"]
