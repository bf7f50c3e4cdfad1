import ast
import inspect
import json
import pickle
import re

import grpc
import grpc.aio
import pytest

from mii_hpc import errors
from mii_hpc.errors import MIIError, RequestError
from mii_hpc.rpc import wire

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__
}
RETRYABLE = {"QueueFullError", "ReplicaLostError", "UnavailableError"}


def drawn_tree():
    """Return {class: its bases} as the module's docstring draws it."""
    bases, above = {}, {}
    for line in errors.__doc__.splitlines():
        found = re.match(r"^([\s│├└─]*)(\w+Error|UnknownArgument)(?: \((\w+)\))?(?:\s|$)", line)
        if found:
            depth = len(found[1])
            above = {level: name for level, name in above.items() if level < depth}
            parent = above[max(above)] if above else "Exception"
            bases[found[2]] = {parent, found[3]} - {None}
            above[depth] = found[2]
    return bases


def test_the_docstring_draws_the_real_tree():
    assert drawn_tree() == {name: {base.__name__ for base in kind.__bases__} for name, kind in CLASSES.items()}


def test_retryable_ones():
    assert {name for name, kind in CLASSES.items() if kind.retryable} == RETRYABLE


def test_the_module_imports_nothing():
    tree = ast.parse(inspect.getsource(errors))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


class Context:
    """What of a gRPC context wire.abort() uses; keeps what the client would see."""

    async def abort(self, code, details, trailing_metadata):
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing_metadata), details=details)


async def over_the_wire(error):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await wire.abort(Context(), error)
    return failure.value


def with_facts(kind):
    """Return an error of a class with a message and, for each of its facts, a value of its own."""
    values = {name: f"{name} ü\n" for name in kind.facts} | ({"replica": 7} if "replica" in kind.facts else {})
    return kind("its message: ü", **values), values


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
async def test_every_error_travels(kind):
    error, facts = with_facts(kind)
    seen = await over_the_wire(error)
    assert not wire.is_lost(seen)
    for back in (wire.error_of(seen), pickle.loads(pickle.dumps(error))):
        assert type(back) is kind
        assert (back.args, str(back)) == (("its message: ü",), str(error))
        assert {name: getattr(back, name) for name in kind.facts} == facts


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_facts_are_documented_and_have_defaults(kind):
    docs = " ".join(base.__doc__ for base in kind.__mro__ if issubclass(base, MIIError))
    assert [name for name in kind.facts if f"        {name}: " not in docs] == []
    assert {getattr(kind("x"), name) for name in kind.facts} <= {"", None, False}


@pytest.mark.parametrize(
    "kind", [k for k in CLASSES.values() if issubclass(k, RequestError)], ids=lambda kind: kind.__name__
)
async def test_every_request_error_has_a_status_code_of_its_own(kind):
    """So that clients in other languages can tell them apart, and gRPC's own failures become ours."""
    code = (await over_the_wire(kind("x"))).code()
    if kind is errors.QueueFullError:
        kind = errors.InvalidRequestError  # what gRPC itself means by the same code: a message above the limit
    assert type(wire.error_of(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata()))) is kind


def test_foreign_failures_become_request_errors():
    for code in grpc.StatusCode:
        failure = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="their words")
        error = wire.error_of(failure)
        assert isinstance(error, RequestError)
        assert str(error) == f"their words ({code.name})"


@pytest.mark.parametrize(
    "told", [{"class": name, "facts": {}} for name in ("NoSuchError", "Exception", "__name__", "", None)] + [{}, [], 1]
)
def test_a_class_that_we_do_not_know_falls_back_to_the_code(told):
    for text in (json.dumps(told), "{", ""):
        metadata = grpc.aio.Metadata((wire.ERROR_KEY, text))
        failure = grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, grpc.aio.Metadata(), metadata, details="x")
        assert type(wire.error_of(failure)) is errors.ReplicaLostError


def test_a_fact_that_we_do_not_know_is_left_out():
    told = {"class": "ReplicaLostError", "facts": {"replica": 1, "new": 2}}
    metadata = grpc.aio.Metadata((wire.ERROR_KEY, json.dumps(told)))
    failure = grpc.aio.AioRpcError(grpc.StatusCode.ABORTED, grpc.aio.Metadata(), metadata, details="x")
    assert vars(wire.error_of(failure)) == {"deployment_name": "", "replica": 1, "host": ""}


def test_a_failed_deployment_shows_the_log():
    error = errors.DeploymentFailedError("job 7 failed", job_id="7", state="FAILED", log="Traceback: ...")
    assert str(error) == "job 7 failed\nTraceback: ..."
    assert (error.job_id, error.state, error.log) == ("7", "FAILED", "Traceback: ...")


def test_python_s_own_classes_catch_ours():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.RequestTimeoutError, TimeoutError)
    assert all(issubclass(kind, MIIError) for kind in CLASSES.values())
