"""What a second Unix user tries against ports and files: `stranger.py USER JSON`, printed as JSON.

Runs as root until grpc is loaded, then as the user: it is the kernel that must refuse him, not a missing import.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 (the user could not load it later, nor the next)
import contextlib
import encodings.idna  # noqa: F401
import grp
import json
import os
import pwd
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from mii_hpc.deployments import credentials
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Method
from tests.planted import plant
from tests.waiting import PATIENCE

Outcome = tuple[str, str, str, str, str]
"""Address, way, token, method, and the status that came of it."""
METHODS: tuple[str, ...] = (
    *Method,
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
TOKENS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "wrong": (("authorization", "Bearer wrong"),),
    "other": (("authorization", "Basic cm9vdDo="),),
}


def become(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([group.gr_gid for group in grp.getgrall() if user in group.gr_mem] + [entry.pw_gid])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir


async def call(channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...], timeout: float) -> str:
    """The status of one call, whatever its kind; all calls look alike on the wire."""
    ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
    answer = ask(b"", metadata=metadata, timeout=timeout)
    try:
        return "ANSWERED" if [part async for part in answer] else "OK"
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def knock(address: str, own: bytes) -> list[Outcome]:
    """Every method with no token and with wrong ones, over TLS and in the clear; reflection and health, too.

    Over TLS without a certificate, and with one of his `own` by the deployment's name.
    """
    host, port = address.rsplit(":", 1)
    certificate = await asyncio.to_thread(certificate_of, host, int(port))
    timeout = PATIENCE if certificate else 4  # what speaks no TLS may answer nothing, ever
    channels = {"plain": grpc.aio.insecure_channel(address)}
    if certificate:
        for way, identity in (("tls", b""), ("own", own)):
            channels[way] = transport.open_channel(address, ClientCredentials(certificate, identity, ""))
    tried = [
        (way, token, method)
        for way in channels
        for token in TOKENS
        for method in (METHODS[:1] if way == "plain" else METHODS)
    ]
    statuses = await asyncio.gather(
        *(call(channels[way], method, TOKENS[token], timeout) for way, token, method in tried)
    )
    for channel in channels.values():
        await channel.close()
    return [(address, way, token, method, status) for (way, token, method), status in zip(tried, statuses, strict=True)]


async def knock_everywhere(addresses: Sequence[str], own: bytes) -> list[list[Outcome]]:
    return await asyncio.gather(*(knock(address, own) for address in addresses))


def certificate_of(host: str, port: int) -> bytes | None:
    for _ in range(3):  # a busy machine may be slow to answer
        with contextlib.suppress(OSError):
            return ssl.get_server_certificate((host, port), timeout=4).encode()
    return None


def read(path: str) -> str | list[str]:
    try:
        if os.path.isdir(path):  # noqa: PTH112
            return os.listdir(path)  # noqa: PTH208
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read().decode(errors="replace")
    except OSError as error:
        return type(error).__name__


def replace(path: str) -> str:
    try:
        with open(f"{path}.mine", "w"):  # noqa: PTH123
            pass
        os.replace(f"{path}.mine", path)  # noqa: PTH105
        return "replaced"
    except OSError as error:
        return type(error).__name__


def main(user: str, task: dict[str, Any]) -> None:
    own = "".join(credentials.self_signed(credentials.TLS_NAME, is_authority=True)).encode()
    become(user)
    result: dict[str, Any] = {"uid": os.getuid()}
    outcomes = asyncio.run(knock_everywhere(task["knock"], own))
    result["calls"] = [outcome for each in outcomes for outcome in each]
    result["read"] = {path: read(path) for path in task.get("read", ())}
    result["replaced"] = {path: replace(path) for path in task.get("replace", ())}
    print(json.dumps(result))


def share(home: Path, entry: dict[str, Any]) -> None:
    """As one who shares his home with bad intent: beside a good share, each kind of a bad one."""
    os.umask(0o022)
    for name in ("good", "fifo", "endless", "link", "escapes", "command", "shell", "other"):
        folder = home / "shared" / name
        folder.mkdir(parents=True)
        certificate, token, told = entry["certificate"], "token", {**entry["entry"], "deployment_name": name}
        match name:
            case "escapes":
                told["detail"] = "\x1b]0;owned\x07"
            case "command":
                told["job_id"] = "--user=root"
            case "shell":
                token = "$(touch owned)"
            case "other":
                told["deployment_name"] = "../good"
        (folder / "tls.crt").write_text(certificate)
        (folder / "client.pem").write_text(entry["identity"])
        (folder / "token").write_text(token)
        (folder / "entry.json").write_text(json.dumps(told))
        if name in ("fifo", "endless", "link"):
            (folder / "entry.json").unlink()
        if name == "fifo":
            os.mkfifo(folder / "entry.json")
        elif name == "endless":
            (folder / "entry.json").touch()
            os.truncate(folder / "entry.json", 3 * 2**30)
        elif name == "link":
            (folder / "entry.json").symlink_to("/dev/zero")


def use(user: str, home: str, name: str) -> None:
    """As a member of the group: generate, then try to terminate."""
    import mii_hpc as mii

    warm = mii.MIIClient, mii.client  # loaded while still root  # noqa: F841
    become(user)
    result = {}
    for verb in ("generate", "status", "rotate_token", "terminate_server"):
        try:
            client = mii.client(name, registry=home)
            answer = client.generate("hello") if verb == "generate" else getattr(client, verb)()
            result[verb] = str(answer[0]) if verb == "generate" else "done"
        except mii.MIIError as error:
            result[verb] = type(error).__name__
    print(json.dumps(result))


if __name__ == "__main__":
    user, what, *rest = sys.argv[1:]
    match what:
        case "knock":
            main(user, json.loads(rest[0]))
        case "use":
            use(user, *rest)
        case "plant":
            become(user)
            plant(Path(rest[0]))
        case "share":
            become(user)
            share(Path(rest[0]), json.loads(rest[1]))
