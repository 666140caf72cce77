"""Which pipe of a multiprocessor an instruction goes through, and how wide an access is.

Opcodes are those of NVIDIA's CUDA Binary Utilities, "Instruction Set Reference"; the pipes those of
Nsight Compute's Kernel Profiling Guide, "Pipelines". IMAD and IDP go through FMA beside FP32; half
precision has the tensor cores' port on compute capability 8.0 and FMA on 9.0 (NVIDIA's forum for
developers, topic 302018), so it is told apart. What no table has is "other", and is counted there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from m3i_fast.benchmarks.core.sass.disassembly import Instruction

_TABLE = {
    # FMA
    "fp32": "FADD FFMA FMUL FADD32I FFMA32I FMUL32I FADD2 FFMA2 FMUL2 FSWZADD",
    "imad": "IMAD IMUL IDP IDP4A IMADSP",
    # FMA or the tensor cores' port
    "half": "HADD2 HADD2_32I HFMA2 HFMA2_32I HMUL2 HMUL2_32I HSET2 HSETP2 HMNMX2 VHMNMX",
    "fp64": "DADD DFMA DMUL DSETP DMNMX DSET",
    # ALU
    "integer": "IADD IADD3 IADD32I IABS IMNMX IMNMX3 VIADD VIADDMNMX VIMNMX VIMNMX3 ISCADD ISETP "
    "ICMP LEA LOP LOP3 LOP32I PLOP3 PSETP SHF SHL SHR SGXT BMSK VABSDIFF VABSDIFF4 "
    "SEL FSEL FMNMX FMNMX3 FSETP FSET FCHK MOV MOV32I PRMT CS2R P2R R2P",
    # XU
    "mufu": "MUFU",
    "convert": "F2F F2I F2IP I2F I2FP I2I I2IP F2FP FRND POPC FLO BREV",
    # Tensor cores
    "tensor": "HMMA IMMA DMMA BMMA HGMMA IGMMA QGMMA BGMMA QMMA OMMA UTCHMMA UTCIMMA UTCQMMA "
    "UTCOMMA",
    "tensor wait": "WARPGROUP WARPGROUPSET",
    # LSU
    "global": "LDG STG LD ST CCTL CCTLL CCTLT LDGSTS LDGDEPBAR PREFETCH QSPC",
    "shared": "LDS STS LDSM STSM MOVM STAS",
    "local": "LDL STL",
    "constant": "LDC LDCU",
    "atomic": "RED REDG REDAS ATOM ATOMG ATOMS REDUX CREDUX SUATOM SURED",
    # Tensor copies
    "tma": "UTMALDG UTMASTG UTMAREDG UTMAPF UTMACCTL UTMACMDFLUSH UTMALST UBLKCP UBLKRED UBLKPF",
    "shuffle": "SHFL",
    # CBU, ADU
    "control": "BRA BRX BRXU JMP JMX JMXU CALL RET EXIT BSSY BSYNC BREAK BMOV WARPSYNC YIELD KILL "
    "BPT RTT RPCMOV NANOSLEEP ENDCOLLECTIVE LEPC PREEXIT ACQBULK",
    "barrier": "BAR SYNCS ARRIVES DEPBAR B2R MEMBAR ERRBAR CGAERRBAR FENCE UCGABAR_ARV "
    "UCGABAR_WAIT",
    # Uniform datapath
    "uniform": "R2UR S2UR CS2UR UP2UR USETMAXREG",
    "other": "NOP S2R VOTE VOTEU ELECT MATCH GETLMEMBASE SETLMEMBASE PMTRIG SETCTAID TEX TLD TLD4 "
    "TMML TXD TXQ SULD SUST AL2P ALD AST OUT PIXLD",
}
CLASSES = tuple(_TABLE)
"""What instructions are counted by, in the order of tables."""
PIPES = {
    "fp32": "fma",
    "imad": "fma",
    "half": "half",
    "fp64": "fp64",
    "integer": "alu",
    "mufu": "xu",
    "convert": "xu",
    "tensor": "tensor",
    "tensor wait": "control",
    "global": "lsu",
    "shared": "lsu",
    "local": "lsu",
    "constant": "constant",
    "atomic": "lsu",
    "tma": "tma",
    "shuffle": "lsu",
    "control": "control",
    "barrier": "control",
    "uniform": "uniform",
    "other": "other",
}
"""The pipe of each class, but for conversions that ALU makes."""
_ALU_CONVERSIONS = ("F2FP", "I2FP", "F2IP", "I2IP")  # pack or unpack; the others take XU
_CLASS_OF = {stem: kind for kind, stems in _TABLE.items() for stem in stems.split()}

BRANCHES = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "EXIT")
LOADS = {"LDG": "global", "LD": "global", "LDS": "shared", "LDSM": "shared", "LDL": "local"}
STORES = {"STG": "global", "ST": "global", "STS": "shared", "STSM": "shared", "STL": "local"}
_ATOMIC_OPERATIONS = "ADD MIN MAX INC DEC AND OR XOR EXCH CAS CAST SUM POPC SAFEADD ARRIVE".split()
_ATOMIC_TYPE = re.compile(r"(?:F|BF|S|U)?(?:16|32|64|128)(?:x\d)?")


def class_of(instruction: Instruction) -> str:
    """Return what an instruction counts as, one of CLASSES."""
    if found := _CLASS_OF.get(instruction.stem):
        return found
    return "uniform" if re.match(r"U[A-Z]", instruction.stem) else "other"


def pipe_of(instruction: Instruction) -> str:
    """Return the pipe that an instruction goes through."""
    if instruction.stem in _ALU_CONVERSIONS:
        return "alu"
    return PIPES[class_of(instruction)]


def width_of(instruction: Instruction) -> int:
    """Return the bits that a lane loads or stores."""
    modifiers = instruction.modifiers
    if instruction.stem in ("LDSM", "STSM"):  # 8 x 8 elements of 16 bits a matrix
        return 32 * int(next((m for m in modifiers if m in ("2", "4")), "1"))
    for modifier in modifiers:
        if modifier in ("U8", "S8"):
            return 8
        if modifier in ("U16", "S16"):
            return 16
        if modifier in ("64", "128", "256"):
            return int(modifier)
    return 32


@dataclass(frozen=True, order=True, slots=True)
class Access:
    """A kind of load or store."""

    memory: str
    """global, shared or local."""
    access: str
    """load, store, or copy: from global to shared memory without registers."""
    bits: int

    def __str__(self) -> str:
        return f"{self.memory} {self.access} {self.bits}-bit"


def access_of(instruction: Instruction) -> Access | None:
    """Return the kind of load or store that an instruction is, else None."""
    stem = instruction.stem
    if stem == "LDGSTS":
        return Access("global", "copy", width_of(instruction))
    if memory := LOADS.get(stem):
        return Access(memory, "load", width_of(instruction))
    if memory := STORES.get(stem):
        return Access(memory, "store", width_of(instruction))
    return None


def atomic_of(instruction: Instruction) -> str:
    """Return an atomic's operation and type, as "RED ADD F32x4"; empty for another instruction."""
    if class_of(instruction) != "atomic":
        return ""
    modifiers = instruction.modifiers
    operation = next((m for m in modifiers if m in _ATOMIC_OPERATIONS), "")
    kind = next((m for m in modifiers if _ATOMIC_TYPE.fullmatch(m)), "32")
    return " ".join(part for part in (instruction.stem, operation, kind) if part)
