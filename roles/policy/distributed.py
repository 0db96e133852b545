"""Members of one group meeting to add up tensors: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from rolecall.protocols.errors import RolecallError
from rolecall.roles.base import Member

SIOCGIFADDR = 0x8915  # Linux: address of a network interface


class Meeting:
    """The collective group of a member; alone in it (world 1), every method does nothing."""

    def __init__(self, member: Member, deadline: float) -> None:
        """Wait for all members.

        Args:
            member: rank, world, backend and the rendezvous "tcp://host:port", on rank 0's host.
            deadline: seconds until all must have come, and seconds that any later sum may take.

        Raises:
            RolecallError: they did not all come in time.
        """
        self.world, self.rank = member.world, member.rank
        if self.world == 1:
            return
        host = urlsplit(member.rendezvous).hostname or ""
        interface = _interface(host if member.rank == 0 else member.node, loopback=host in ("127.0.0.1", "localhost", "::1"))
        if interface:
            # else gloo resolves the host's name, which on many machines leads to an address that others can't reach
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        try:
            dist.init_process_group(
                member.backend,
                init_method=member.rendezvous,
                world_size=member.world,
                rank=member.rank,
                timeout=timedelta(seconds=deadline),
                device_id=torch.device(member.device) if member.backend == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise RolecallError(
                f"{member.role}[{member.rank}]: {member.world} members did not meet at {member.rendezvous or 'no address'} within "
                f"{deadline:.0f} s: {str(error).splitlines()[0]}. Look at the logs of the others for one that failed to start."
            ) from error

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the members, which get equal bits."""
        if self.world == 1:
            return
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()  # the group's own deadline ends it

    def leave(self) -> None:
        """End the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _interface(address: str, *, loopback: bool) -> str:
    """Name of the network interface that has an IPv4 address; "" if none is found."""
    if loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
