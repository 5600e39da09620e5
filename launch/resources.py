"""Kinds of hosts, by the name that `-h` takes. Registered as torchx named resources in pyproject.toml.

The numbers are requests for one node: a little below what hosts of that kind have at the large providers, so that the
system's own daemons still fit. torchx brings exact AWS types as well, for instance `-h aws_p5.48xlarge` with its
network adapters.
"""

from torchx.specs import Resource


def cpu2() -> Resource:
    return Resource(cpu=2, gpu=0, memMB=6_000)


def cpu16() -> Resource:
    return Resource(cpu=16, gpu=0, memMB=60_000)


def a100x8() -> Resource:
    return Resource(cpu=88, gpu=8, memMB=800_000)


def h100x8() -> Resource:
    return Resource(cpu=88, gpu=8, memMB=1_600_000)


def h200x8() -> Resource:
    return Resource(cpu=88, gpu=8, memMB=1_600_000)
